"""Llama 3.1 8B on sequences of 131,072 tokens, on 64 TPU v5p chips (4x4x4), with four chips to a sequence."""

from dataclasses import replace

from jaxinfra import AdamW, Cosine, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="llama3-8b-128k",
        # Compiled for v5p, ring attention takes 15 % more cycles, since it adds up its parts in float32.
        model=replace(shape("llama-3.1-8b"), remat="full", context_attention="gather"),
        data=TokenData(store="stores/text-llama3", recipe="configs/data/text_llama3.py", seq_len=131072),
        mesh=MeshConfig(fsdp=16, context=4),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=Cosine(warmup_steps=200), peak_lr=3e-5),
        train=TrainConfig(steps=2000, global_batch=16, eval_every=200, eval_samples=64),
    )
