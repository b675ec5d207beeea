"""Llama 3.1 8B from scratch on 64 TPU v5p chips (4x4x4), fully sharded, sequences of 8,192 tokens."""

from dataclasses import replace

from jaxinfra import AdamW, Cosine, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="llama3-8b",
        model=replace(shape("llama-3.1-8b"), remat="full"),
        data=TokenData(store="stores/text-llama3", recipe="configs/data/text_llama3.py", seq_len=8192),
        mesh=MeshConfig(fsdp=64),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=Cosine(warmup_steps=2000), peak_lr=3e-4),
        train=TrainConfig(steps=100000, global_batch=128, eval_every=1000, eval_samples=1024, compiler="overlap"),
    )
