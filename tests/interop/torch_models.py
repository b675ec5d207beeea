"""Makes tiny random models with transformers, and writes each with its logits into a folder.

Runs in an environment of its own, with torch and transformers: `python tests/interop/torch_models.py OUT < CASES.json`.
Cases are `{name: {"config": keys, "gradients": whether}}`. Gradients of the mean cross entropy of the next token are
written as another model: each weight is its gradient.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

LENGTH = 24


def make(folder: Path, keys: dict, gradients: bool) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**keys)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "e_score" in n)):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder)
    tokens = torch.randint(0, config.vocab_size, (2, LENGTH))
    logits = model(tokens).logits
    np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.detach().numpy())
    if gradients:
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.copy_(torch.zeros_like(tensor) if tensor.grad is None else tensor.grad)
        model.save_pretrained(folder / "gradients")


if __name__ == "__main__":
    for name, case in json.load(sys.stdin).items():
        make(Path(sys.argv[1]) / name, case["config"], case["gradients"])
