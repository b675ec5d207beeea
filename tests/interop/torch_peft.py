"""Adapters in PEFT: `torch_peft.py make FOLDER` makes some, `torch_peft.py read FOLDER` computes with those of ours.

"make" takes `FOLDER/NAME/case.json`: the folder of a base, the options of a `LoraConfig`, and tokens. It writes the
adapter with random matrices, and logits beside it. "read" loads `FOLDER/NAME/adapter` beside the base that it names,
`FOLDER/NAME/merged` alone, and computes logits of `tokens.npy` there. What PEFT warns of is an error.
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

OPTIONS = {"dtype": torch.float32, "attn_implementation": "eager"}


def write_logits(model: torch.nn.Module, folder: Path, kind: str) -> None:
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    with torch.no_grad():
        np.save(folder / f"{kind}.npy", model.eval()(tokens).logits.numpy())


def read(folder: Path) -> None:
    for kind, auto in (("adapter", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        if (folder / kind).exists():
            write_logits(auto.from_pretrained(folder / kind, **OPTIONS), folder, kind)


def make(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(case["base"], **OPTIONS)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **case["options"]))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder / "made")
    write_logits(model, folder, "made")


warnings.filterwarnings("error", module="peft")
for each in Path(sys.argv[2]).iterdir():
    {"make": make, "read": read}[sys.argv[1]](each)
