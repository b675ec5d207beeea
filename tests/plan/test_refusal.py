"""What compilers say becomes one line: how much is too much, and what to change."""

from dataclasses import replace

import pytest

from jaxinfra.data.tokens import TokenData
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.plan.refusal import explained, smaller
from jaxinfra.run import Run
from jaxinfra.train.loop import TrainConfig
from tests.refusals import names

RUN = Run(
    name="test",
    model=TransformerConfig(vocab_size=64, layers=2, width=32, heads=4, mlp_dim=64),
    data=TokenData(store="none", seq_len=16),
    train=TrainConfig(global_batch=96),
)
OOM = "RESOURCE_EXHAUSTED: "


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            OOM + "E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(46.60G) exceeds available HBM (15.75G). HLO module: jit__train_step.\nSee https://openxla.org/xla/errors",
            "46.60 GiB temporaries 15.75: 30.85 use model.remat=full, train.accumulate=3,",
        ),
        (
            OOM + "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.50T of 32.00G hbm. "
            "Exceeded hbm capacity by 17.34G.",
            "1536.00 GiB 32.00: 1504.00 use model.remat=full, train.accumulate=12,",
        ),
        (
            OOM + "TPU TensorCore Hbm usage: 34.82G, SparseCore Hbm usage 174.10G, exceeding available bytes: 95.74G",
            "34.82G, 95.74G; use model.remat=full, train.accumulate=2,",
        ),
        (
            OOM + "E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem",
            "vector CompileTimeScopedVmemOom: use model.attention=xla",
        ),
        ("cuDNN not found.", "cuDNN; use model.attention=xla, nvidia-cudnn-cu13"),
        ("INTERNAL: libdevice not found at ./libdevice.10.bc", "ptxas libdevice use '.[compile]'"),
        ("INTERNAL: Mosaic failed\n  more", "Mosaic failed; --debug"),
    ],
    ids=["temporaries", "in all", "unknown form", "vector memory", "cudnn", "cuda", "anything"],
)
def test_a_refusal_is_one_line_that_says_what_to_do(message: str, named: str) -> None:
    names(explained(message, RUN, 12), named)


@pytest.mark.parametrize(
    ("remat", "accumulate", "rows", "times", "fix"),
    [
        ("none", 1, 12, 1.1, "use model.remat=full, train.accumulate=2, or more devices"),
        ("full", 2, 12, 2.5, "use train.accumulate=6, or more devices"),
        ("full", 1, 10, 2.5, "use train.accumulate=5, or more devices"),
        ("full", 1, 3, 9.0, "use train.accumulate=3, or more devices"),
        ("dots", 4, 4, 2.0, "use model.remat=full, or more devices"),
        ("full", 1, 1, 2.0, "use more devices"),
        ("full", 1, 0.5, 2.0, "use more devices"),
    ],
)
def test_what_would_help_is_what_is_not_done_yet(
    remat: str, accumulate: int, rows: float, times: float, fix: str
) -> None:
    run = replace(RUN, model=replace(RUN.model, remat=remat), train=TrainConfig(global_batch=96, accumulate=accumulate))
    assert smaller(run, rows, times) == fix
