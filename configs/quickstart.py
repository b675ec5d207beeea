"""A small language model of Python source, trained in a few minutes on two CPU cores.

The corpus is the standard library of the running Python: always there, no network.
"""

from jaxinfra import WSD, Muon, OptimConfig, Precision, Rope, Run, TokenData, TrainConfig, TransformerConfig


def config() -> Run:
    return Run(
        name="quickstart",
        model=TransformerConfig(
            vocab_size=4096, num_layers=4, hidden_size=192, num_heads=6, mlp_dim=512, rope=Rope(), qk_norm=True
        ),
        data=TokenData(store="stores/python-stdlib", recipe="configs/data/python_stdlib.py", seq_len=256),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=Muon(), schedule=WSD(warmup_steps=20, decay_fraction=0.4), peak_lr=1e-2),
        train=TrainConfig(steps=250, global_batch=16, eval_every=125),
    )
