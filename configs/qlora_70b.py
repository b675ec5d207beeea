"""An adapter for Llama 3.1 70B Instruct on one host of eight TPU v5e chips (2x4), which holds the weights as NF4."""

from dataclasses import replace

from jaxinfra import AdamW, Cosine, MeshConfig, OptimConfig, Precision, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape
from jaxinfra.models.adapter import Lora


def config() -> Run:
    return Run(
        name="qlora-70b",
        model=replace(shape("llama-3.1-70b"), remat="full"),
        init="hf:meta-llama/Llama-3.1-70B-Instruct",
        adapter=Lora(rank=16, alpha=32.0),
        precision=Precision(frozen="nf4"),
        data=TokenData(
            store="stores/chats-llama3", recipe="configs/data/chats_llama3.py", seq_len=4096, packing="best_fit"
        ),
        mesh=MeshConfig(fsdp=4, tensor=2),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=100), peak_lr=2e-4),
        train=TrainConfig(steps=2000, global_batch=16, accumulate=4, eval_every=200),
    )
