"""What waits in host memory takes none of the device's: as the TPU compiler allots it."""

import functools
from dataclasses import replace

import jax
import pytest

from jaxinfra.models.remat import Remat
from jaxinfra.optim.optimizers import Optim
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.plan.compiled import Memory, compile_step, program_for
from jaxinfra.plan.topology import parse
from jaxinfra.train.loop import TrainConfig
from tests.golden.compiled import DENSE

ON = parse("v5e:2x2")
RUN = replace(
    DENSE,
    name="offload",
    model=replace(
        DENSE.model,
        vocab_size=8192,
        width=1024,
        heads=8,
        kv_heads=8,
        head_dim=128,
        mlp_dim=4096,
        layers=8,
        remat="full",
    ),
    mesh=MeshConfig(fsdp=4),
)
IN_HOST_MEMORY = "S(5)"
"""How the text marks the layout of an array there."""


@functools.cache
def compiled(*, offload: bool = False, remat: Remat = "full", rows: int = 128) -> tuple[Memory, bool]:
    """What is allotted, and whether the text has arrays in host memory."""
    run = replace(
        RUN, optim=Optim(offload=offload), model=replace(RUN.model, remat=remat), train=TrainConfig(global_batch=rows)
    )
    texts: list[str] = []
    found = compile_step(run, ON, dump=texts.append, report=lambda line: None)
    return found.memory, IN_HOST_MEMORY in texts[0]


@pytest.mark.slow
def test_state_of_the_optimiser_leaves_the_device() -> None:
    """Both moments of AdamW do; of what comes back only a few layers are there at once."""
    (here, marked), (away, moved) = compiled(), compiled(offload=True)
    assert moved and not marked and here.host == 0
    state = program_for(replace(RUN, train=TrainConfig(global_batch=4)), ON).state
    moments = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.opt_state) if a.ndim) // ON.count
    assert away.host == pytest.approx(moments, rel=0.01)
    assert here.arguments - away.arguments == pytest.approx(moments, rel=0.01)
    assert away.temporaries - here.temporaries < moments / 4


@pytest.mark.slow
def test_what_layers_keep_leaves_the_device() -> None:
    """Six products a layer: queries, keys, values, the output of attention, gate and up.

    What is left is what the policy takes that keeps nothing.
    """
    (dots, marked), (away, moved) = (compiled(remat=policy, rows=128) for policy in ("dots", "offload"))
    full, _ = compiled(remat="full", rows=128)
    assert moved and not marked and dots.host == 0
    model, tokens = RUN.model, 128 * RUN.data.seq_len // ON.count
    kept = 2 * tokens * model.layers * (4 * model.width + 2 * model.mlp_dim)
    assert away.host == kept
    assert dots.temporaries - full.temporaries > 0.9 * kept
    assert away.temporaries - full.temporaries < 0.05 * kept
