"""GPT-2 124M on one machine of eight GPUs."""

from jaxinfra import WSD, AdamW, MeshConfig, OptimConfig, Run, TokenData, TrainConfig
from jaxinfra.families.zoo import shape


def config() -> Run:
    return Run(
        name="gpt2-124m",
        model=shape("gpt2"),
        data=TokenData(store="stores/text-gpt2", recipe="configs/data/text_gpt2.py", seq_len=1024),
        mesh=MeshConfig(fsdp=8),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=WSD(warmup_steps=250), peak_lr=6e-4),
        train=TrainConfig(steps=20000, global_batch=512, accumulate=4, eval_every=1000, eval_samples=1024),
    )
