"""A small language model of Python source, trained in one or two minutes on two CPU cores.

The corpus is the standard library of the running Python: always there, no network.
"""

from jaxinfra import (
    MLP,
    WSD,
    Attention,
    Layer,
    Muon,
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
        name="quickstart",
        model=TransformerConfig(
            vocab_size=4096,
            num_layers=2,
            hidden_size=256,
            layers=(Layer(mixer=Attention(num_heads=8, qk_norm="head"), mlp=MLP(dim=704)),),
        ),
        data=TokenData(store="stores/python-stdlib", recipe="configs/data/python_stdlib.py", seq_len=256),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=Muon(), schedule=WSD(warmup_steps=20, decay_fraction=0.4), peak_lr=1e-2),
        train=TrainConfig(steps=400, global_batch=8, eval_every=200),
        track=TrackConfig(sample_prompt="def main("),
    )
