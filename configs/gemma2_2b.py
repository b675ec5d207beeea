"""Gemma 2 2B on 16 TPU v6e chips (4x4): sliding-window and full attention in turns, soft caps, 256,000 tokens."""

from dataclasses import replace

from jaxinfra import WSD, AdamW, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="gemma2-2b",
        model=replace(shape("gemma-2-2b"), remat="full"),
        data=TokenData(store="stores/text-gemma2", recipe="configs/data/text_gemma2.py", seq_len=8192),
        mesh=MeshConfig(fsdp=8, tensor=2),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=WSD(warmup_steps=1000), peak_lr=3e-4),
        train=TrainConfig(steps=50000, global_batch=64, eval_every=1000, eval_samples=1024),
    )
