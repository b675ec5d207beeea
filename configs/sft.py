"""Qwen3 0.6B, trained on conversations on one host of eight TPU v5e chips: only the answers count in the loss."""

from dataclasses import replace

from jaxinfra import AdamW, Cosine, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="sft",
        model=replace(shape("qwen3-0.6b"), remat="full"),
        init="hf:Qwen/Qwen3-0.6B",
        data=TokenData(
            store="stores/chats-qwen3", recipe="configs/data/chats_qwen3.py", seq_len=4096, packing="best_fit"
        ),
        mesh=MeshConfig(fsdp=8),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=100), peak_lr=2e-5),
        train=TrainConfig(steps=2000, global_batch=64, eval_every=200),
    )
