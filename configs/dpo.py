"""Qwen3 0.6B, trained by DPO on pairs of answers on one host of eight TPU v5e chips, from the model of sft.py."""

from dataclasses import replace

from jaxinfra import DPO, AdamW, Cosine, MeshConfig, OptimConfig, PairData, Run, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="dpo",
        model=replace(shape("qwen3-0.6b"), remat="full"),
        init="runs/sft",
        data=PairData(
            store="stores/pairs-qwen3", recipe="configs/data/pairs_qwen3.py", seq_len=2048, cached_reference=True
        ),
        objective=DPO(beta=0.1),
        mesh=MeshConfig(fsdp=8),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=50), peak_lr=5e-7),
        train=TrainConfig(steps=1000, global_batch=64, eval_every=100),
    )
