"""Llama 3.1 70B on two slices of 128 TPU v5p chips.

Parameters are sharded inside a slice; gradients are summed over the two slices once a step.
"""

from dataclasses import replace

from jaxinfra import AdamW, Cosine, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="llama3-70b",
        model=replace(shape("llama-3.1-70b"), remat="full"),
        data=TokenData(store="stores/text-llama3", recipe="configs/data/text_llama3.py", seq_len=8192),
        mesh=MeshConfig(replica=2, fsdp=32, tensor=4),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=Cosine(warmup_steps=2000), peak_lr=1.5e-4),
        train=TrainConfig(steps=100000, global_batch=256, accumulate=2, eval_every=1000, eval_samples=1024),
    )
