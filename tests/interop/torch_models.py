"""Makes tiny random models of transformers, and lists the tensors of large ones without memory.

Runs in an environment of its own, with torch and transformers: `python tests/interop/torch_models.py OUT`.
`OUT/tiny.json` has the config of each tiny model by name, `OUT/published.json` those of large ones. Of a tiny model
`OUT/NAME` gets the checkpoint, and `OUT/NAME.npz` tokens, logits, and logits by the config that jaxinfra has "written";
if the config asks for them also the logits of parts of the rows as "documents" alone, and greedy continuations "after"
prompts.
`OUT/NAME.grads` gets the gradients of the mean loss, as a checkpoint, if the config asks for them. `OUT/tensors.json`
gets the shapes of the tensors of large models, by their names in a checkpoint.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.core_model_loading import revert_weight_conversion

ROWS, LENGTH, NOISE = 2, 24, 0.1


def model_of(keys: dict) -> torch.nn.Module:
    config, auto = AutoConfig.for_model(**keys), AutoModelForCausalLM
    if "vision_config" in keys:
        auto = AutoModelForImageTextToText
    return auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def write_tiny(name: str, keys: dict, out: Path) -> None:
    torch.manual_seed(0)
    gradients, written = keys.pop("gradients", False), keys.pop("written")
    documents, prompts = keys.pop("documents", []), keys.pop("prompts", [])
    length, noise = keys.pop("length", LENGTH), keys.pop("noise", NOISE)
    model = model_of(keys)
    with torch.no_grad():
        # Biases and norms begin with values that would hide a mistake.
        kept = ("e_score_correction_bias", "layer_scalar")
        buffers = (buffer for name, buffer in model.named_buffers() if name.endswith(kept))
        for tensor in (*model.parameters(), *buffers):
            tensor.add_(torch.randn_like(tensor) * noise)
    model.save_pretrained(out / name)
    tokens = torch.randint(0, model.config.get_text_config().vocab_size, (ROWS, length))
    with torch.set_grad_enabled(gradients):
        # The whole Llama 4 of transformers 5.24 fails without images.
        logits = (model.language_model if keys["model_type"] == "llama4" else model)(tokens).logits
    arrays = {"tokens": tokens, "logits": logits.detach()}
    with torch.no_grad():
        if documents:
            arrays["documents"] = torch.cat([model(part).logits for part in tokens.split(documents, 1)], 1)
        for length in prompts:
            arrays[f"after {length}"] = model.generate(tokens[:1, :length], do_sample=False, max_length=LENGTH)
    if written is not None:
        other = model_of(written)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            arrays["rewritten"] = other(tokens).logits
    np.savez(out / f"{name}.npz", **{key: array.numpy() for key, array in arrays.items()})
    if gradients:
        targets = tokens[:, 1:].reshape(-1)
        torch.nn.functional.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets).backward()
        grads = {path: parameter.grad for path, parameter in model.named_parameters()}
        (out / f"{name}.grads").mkdir()
        save_file(
            {path: grad.contiguous() for path, grad in revert_weight_conversion(model, grads).items()},
            out / f"{name}.grads" / "model.safetensors",
        )


def tensors_of(keys: dict) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = model_of(keys)
    tensors = revert_weight_conversion(model, model.state_dict())
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    return {name: list(tensor.shape) for name, tensor in tensors.items() if name not in tied}


def main(out: Path) -> None:
    for name, keys in json.loads((out / "tiny.json").read_text()).items():
        write_tiny(name, keys, out)
    published = json.loads((out / "published.json").read_text())
    (out / "tensors.json").write_text(json.dumps({name: tensors_of(keys) for name, keys in published.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
