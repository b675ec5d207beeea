"""Writes logits of adapters in the format of PEFT, and of models: `torch_peft.py FOLDER`, in an environment of torch.

`FOLDER/NAME/adapter` is loaded beside the base that it names, `FOLDER/NAME/merged` alone; `tokens.npy` there are the
tokens. What PEFT warns of is an error.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

warnings.filterwarnings("error", module="peft")
for folder in Path(sys.argv[1]).iterdir():
    tokens = torch.from_numpy(np.load(folder / "tokens.npy"))
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    for kind, auto in (("adapter", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        if (folder / kind).exists():
            model = auto.from_pretrained(folder / kind, **options).eval()
            with torch.no_grad():
                np.save(folder / f"{kind}.npy", model(tokens).logits.numpy())
