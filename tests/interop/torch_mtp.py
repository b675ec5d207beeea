"""Runs exported models in transformers, with their modules for multi-token prediction.

Runs in an environment with torch and transformers: `python tests/interop/torch_mtp.py OUT`. `OUT/tokens.npy`
has tokens, the folders of `OUT` have models; of each, `OUT/NAME.npz` gets the logits, and those of the first module.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_layers import MtpModel


def logits_of(folder: Path, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    config = main.config
    if config.model_type == "qwen3_next":  # whose modules transformers does not run by itself
        config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
        main._keys_to_ignore_on_load_unexpected = [r"^mtp\."]
    else:  # transformers knows the numbers of layers of published models
        main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\..*"]
    modules = MtpModel.from_pretrained(main).eval()
    assert not [name for name, each in modules.named_parameters() if each.is_meta]
    with torch.no_grad():
        hidden, logits = main.model(tokens).last_hidden_state, main(tokens).logits
        positions = torch.arange(tokens.shape[1] - 1)[None].expand(len(tokens), -1)
        hidden = modules.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
        return {"logits": logits.numpy(), "later": main.lm_head(hidden).numpy()}


def main(out: Path) -> None:
    tokens = torch.from_numpy(np.load(out / "tokens.npy"))
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        np.savez(out / f"{folder.name}.npz", **logits_of(folder, tokens))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
