"""A vision transformer of handwritten digits, trained in about a minute on two CPU cores.

The images come with scikit-learn (the extra `digits`): no network.
"""

from jaxinfra import (
    AdamW,
    Classification,
    Cosine,
    ImageData,
    OptimConfig,
    Precision,
    Run,
    TrainConfig,
    VisionTransformerConfig,
)


def config() -> Run:
    return Run(
        name="vit-digits",
        model=VisionTransformerConfig(
            image_size=8,
            patch_size=2,
            channels=1,
            num_classes=10,
            num_layers=4,
            hidden_size=64,
            num_heads=4,
            mlp_dim=128,
            dropout=0.2,
        ),
        objective=Classification(label_smoothing=0.1),
        data=ImageData(store="stores/digits", recipe="configs/data/digits.py", image_size=8, channels=1, max_pixel=16),
        precision=Precision(compute="float32"),
        optim=OptimConfig(optimizer=AdamW(weight_decay=0.1), schedule=Cosine(warmup_steps=50), peak_lr=4e-3),
        train=TrainConfig(steps=1000, global_batch=96, eval_every=250),
    )
