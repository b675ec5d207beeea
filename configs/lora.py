"""An adapter for Llama 3.1 8B Instruct, trained on conversations on one host of eight TPU v5e chips (2x4).

`mesh.fsdp=1` trains it on one H100 GPU.
"""

from dataclasses import replace

from jaxinfra import AdamW, Cosine, MeshConfig, OptimConfig, Precision, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape
from jaxinfra.models.adapter import Lora


def config() -> Run:
    return Run(
        name="lora",
        model=replace(shape("llama-3.1-8b"), remat="full"),
        init="hf:meta-llama/Llama-3.1-8B-Instruct",
        adapter=Lora(rank=16, alpha=32.0),
        precision=Precision(frozen="bfloat16"),
        data=TokenData(
            store="stores/chats-llama3", recipe="configs/data/chats_llama3.py", seq_len=4096, packing="best_fit"
        ),
        mesh=MeshConfig(fsdp=8),
        optim=OptimConfig(optimizer=AdamW(), schedule=Cosine(warmup_steps=100), peak_lr=2e-4),
        train=TrainConfig(steps=2000, global_batch=16, accumulate=2, eval_every=200),
    )
