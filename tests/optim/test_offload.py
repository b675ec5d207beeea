"""Offloaded state gives the same updates."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfra.optim.config import OptimConfig, Optimizer
from jaxinfra.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon, make_optimizer
from jaxinfra.optim.schedules import Cosine
from tests.optim.test_optim_sharding import sharded

OPTIM = OptimConfig(schedule=Cosine(warmup_steps=1), peak_lr=0.1)
OPTIMIZERS = [AdamW(), Adafactor(min_factored_dim=8), Lion(), SGD(nesterov=True), Muon()]


def after_two_steps(optim: OptimConfig, specs: Any, draw: Any) -> tuple[Any, Any]:
    """Returns the updates of the second step, and the state."""
    tx = make_optimizer(optim, steps=4, specs=specs)
    params = sharded(draw(0))
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    updates = None
    for seed in (1, 2):
        updates, state = update(sharded(draw(seed)), state, params)
    return updates, state


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_offloading_changes_no_update(specs: Any, draw: Any, optimizer: Optimizer, state_dtype: Any) -> None:
    optim = replace(OPTIM, optimizer=optimizer, state_dtype=state_dtype)
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("replica", "fsdp", "tensor"))):
        wanted = after_two_steps(optim, specs, draw)
        found = after_two_steps(replace(optim, offload=True), specs, draw)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    rounding = 1e-5 if state_dtype == "float32" else 2**-8
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert (one.shape, one.dtype, one.sharding.spec) == (other.shape, other.dtype, other.sharding.spec)
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=rounding * max(np.abs(other).max(), 1e-30))
    for leaf in jax.tree.leaves(found[1]):
        assert leaf.sharding.memory_kind == ("pinned_host" if leaf.ndim else "device")
