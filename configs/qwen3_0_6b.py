"""Qwen3 0.6B on one machine of eight TPU v6e chips (2x4), with an exponential moving average of the parameters."""

from dataclasses import replace

from jaxinfra import WSD, AdamW, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="qwen3-0.6b",
        model=replace(shape("qwen3-0.6b"), remat="dots"),
        data=TokenData(store="stores/text-qwen3", recipe="configs/data/text_qwen3.py", seq_len=4096),
        mesh=MeshConfig(fsdp=8),
        optim=OptimConfig(
            optimizer=AdamW(weight_decay=0.1), schedule=WSD(warmup_steps=500), peak_lr=1e-3, ema_decay=0.9995
        ),
        train=TrainConfig(steps=20000, global_batch=128, accumulate=2, eval_every=1000, eval_samples=1024),
    )
