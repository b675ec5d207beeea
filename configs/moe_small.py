"""A small model with experts in place of MLPs: two of eight, and a shared one, process each token.

A token costs as many FLOPs as with MLPs of dimension 528. Biases balance the load of the experts.
"""

from jaxinfra import (
    WSD,
    Attention,
    Layer,
    MixtureOfExperts,
    Muon,
    OptimConfig,
    Precision,
    Run,
    TokenData,
    TrainConfig,
    TransformerConfig,
)


def config() -> Run:
    return Run(
        name="moe-small",
        model=TransformerConfig(
            vocab_size=4096,
            num_layers=4,
            hidden_size=192,
            layers=(
                Layer(
                    mixer=Attention(num_heads=6, qk_norm="head"),
                    mlp=MixtureOfExperts(
                        dim=176,
                        num_experts=8,
                        top_k=2,
                        num_shared_experts=1,
                        score_function="sigmoid",
                        bias_update_rate=1e-2,
                        balance_loss=1e-3,
                    ),
                ),
            ),
        ),
        data=TokenData(store="stores/python-stdlib", recipe="configs/data/python_stdlib.py", seq_len=256),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=Muon(), schedule=WSD(warmup_steps=20, decay_fraction=0.4), peak_lr=1e-2),
        train=TrainConfig(steps=250, global_batch=16, eval_every=125),
    )
