"""The model of `python -m launch bench step`: a small Llama, 4,096 tokens a step, in float32."""

from jaxinfra import (
    MLP,
    AdamW,
    Attention,
    Constant,
    Layer,
    NormConfig,
    OptimConfig,
    Precision,
    Run,
    TokenData,
    TrackConfig,
    TrainConfig,
    TransformerConfig,
)


def config() -> Run:
    return Run(
        name="bench-small",
        model=TransformerConfig(
            vocab_size=8192,
            num_layers=4,
            hidden_size=256,
            layers=(Layer(mixer=Attention(num_heads=8), mlp=MLP(dim=1024)),),
            norm=NormConfig(eps=1e-6),
        ),
        data=TokenData(
            store="stores/python-stdlib-8k",
            recipe="configs/data/python_stdlib_8k.py",
            seq_len=256,
            mask_documents=False,
        ),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=Constant(), peak_lr=3e-4, clip_norm=None),
        train=TrainConfig(steps=100, global_batch=16, eval_every=None),
        track=TrackConfig(tensorboard=False),
    )
