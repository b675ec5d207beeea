"""The mixture of experts of `python -m launch parity`: eight divides every dimension that a mesh can shard."""

from jaxinfra import (
    AdamW,
    Attention,
    CausalLM,
    Constant,
    Layer,
    MixtureOfExperts,
    OptimConfig,
    Precision,
    Run,
    TokenData,
    TrainConfig,
    TransformerConfig,
)


def config() -> Run:
    return Run(
        name="parity-moe",
        model=TransformerConfig(
            vocab_size=128,
            num_layers=8,
            hidden_size=64,
            layers=(
                Layer(
                    mixer=Attention(num_heads=16, num_kv_heads=8, head_dim=8),
                    mlp=MixtureOfExperts(
                        dim=32,
                        num_experts=8,
                        top_k=2,
                        num_shared_experts=1,
                        score_function="sigmoid",
                        routed_scaling_factor=1.5,
                        num_groups=4,
                        top_k_groups=2,
                        bias_update_rate=1e-3,
                        capacity_factor=1.25,
                        balance_loss=0.1,
                        z_loss=1e-2,
                    ),
                ),
            ),
        ),
        objective=CausalLM(loss_chunks=2, z_loss=1e-2),
        data=TokenData(store="none", seq_len=32, mask_documents=True),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(), schedule=Constant(), peak_lr=1e-3),
        train=TrainConfig(steps=10, global_batch=32),
    )
