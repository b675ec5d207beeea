"""The dense model of `python -m launch parity`: eight divides every dimension that a mesh can shard."""

from jaxinfra import (
    MLP,
    AdamW,
    Attention,
    CausalLM,
    Constant,
    Layer,
    OptimConfig,
    Precision,
    Run,
    TokenData,
    TrainConfig,
    TransformerConfig,
)


def config() -> Run:
    return Run(
        name="parity-dense",
        model=TransformerConfig(
            vocab_size=128,
            num_layers=8,
            hidden_size=64,
            layers=(
                Layer(mixer=Attention(num_heads=16, num_kv_heads=8, head_dim=8, qk_norm="head"), mlp=MLP(dim=128)),
            ),
            tie_embeddings=True,
        ),
        objective=CausalLM(loss_chunks=2, z_loss=1e-2),
        data=TokenData(store="none", seq_len=32, mask_documents=True),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(), schedule=Constant(), peak_lr=1e-3),
        train=TrainConfig(steps=10, global_batch=32),
    )
