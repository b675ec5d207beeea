"""Dispatch and combine return each token's results from its experts, on any number of shards, ragged or padded."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.parallel import expert
from jaxinfra.parallel.expert import ExpertPlacement, plan_dispatch
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig

TOKENS, CHOICES, EXPERTS, WIDTH = 6, 2, 8, 3
"""Tokens are those of one of eight devices."""


def choices(kind: str) -> np.ndarray:
    """Returns the experts of the tokens of eight devices; `EXPERTS` marks a dropped choice."""
    draw, rows = np.random.default_rng(0), 8 * TOKENS
    if kind == "all choose two":
        return np.tile(np.array([3, 2], np.int32), (rows, 1))
    found = np.stack([draw.permutation(EXPERTS)[:CHOICES] for _ in range(rows)]).astype(np.int32)
    dropped = {"some are dropped": 0.2, "all are dropped": 1.0}.get(kind, 0)
    return np.where(draw.random(found.shape) < dropped, EXPERTS, found)


def placement(shards: int, **changes: Any) -> ExpertPlacement:
    axes = ("expert",) if shards > 1 else ()
    max_rows = TOKENS * min(CHOICES, EXPERTS // shards)
    return replace(ExpertPlacement(num_experts=EXPERTS, axes=axes, num_shards=shards, max_rows=max_rows), **changes)


def dispatch_and_combine(
    placement: ExpertPlacement, x_ND: jax.Array, experts_NK: jax.Array, factors_E: jax.Array
) -> jax.Array:
    """Returns each token's result for each choice, from experts that multiply by their factor; on one device."""
    plan = plan_dispatch(placement, experts_NK)
    rows_MD = plan.dispatch(x_ND)
    first = jax.lax.axis_index(placement.axes) * placement.experts_per_shard if placement.axes else 0
    expert_M = first + jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(len(rows_MD)), side="right")
    return plan.combine(rows_MD * factors_E[jnp.minimum(expert_M, EXPERTS - 1)][:, None])


def check(placement: ExpertPlacement, experts: np.ndarray) -> None:
    """Compares results and gradients with a plain lookup of each choice's factor."""
    shards, draw = placement.num_shards, np.random.default_rng(1)
    mesh = make_mesh(MeshConfig(fsdp=8 // shards, expert=shards), jax.devices())
    spec = PartitionSpec(tuple(axis for axis in ("fsdp", "expert") if mesh.shape[axis] > 1))
    x = draw.normal(size=(len(experts), WIDTH)).astype(np.float32)
    dy = draw.normal(size=(*experts.shape, WIDTH)).astype(np.float32)
    factors = np.arange(1, EXPERTS + 1, dtype=np.float32)
    factor_NK1 = np.where(experts < EXPERTS, np.append(factors, 0)[experts], 0)[..., None]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, spec)) for a in (x, experts, dy)]

        def run(x: jax.Array, experts: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, pull = jax.vjp(lambda x: dispatch_and_combine(placement, x, experts, jnp.asarray(factors)), x)
            return y, pull(dy)[0]

        y, dx = jax.jit(jax.shard_map(run, in_specs=(spec,) * 3, out_specs=(spec, spec)))(*placed)
    np.testing.assert_allclose(y, factor_NK1 * x[:, None], rtol=1e-6)
    np.testing.assert_allclose(dx, (factor_NK1 * dy).sum(1), atol=1e-5)


KINDS = ("even", "some are dropped", "all choose two", "all are dropped")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_padded_exchange(shards: int, kind: str) -> None:
    check(placement(shards), choices(kind))


def emulated_ragged_all_to_all(operand, output, *sizes: jax.Array, axis_name: Sequence[str]) -> jax.Array:
    """`jax.lax.ragged_all_to_all` from operations that CPUs have."""
    operands, all_sizes = jax.lax.all_gather(operand, axis_name), [jax.lax.all_gather(a, axis_name) for a in sizes]
    me, shards = jax.lax.axis_index(axis_name), len(operands)
    parts = len(sizes[0]) // shards
    for source in range(shards):
        for part in range(parts):
            start, size, out = (a[source, me * parts + part] for a in all_sizes[:3])
            row = jnp.arange(len(output)) - out
            is_sent = (row >= 0) & (row < size)
            output = jnp.where(is_sent[:, None], operands[source][jnp.clip(start + row, 0, len(operand) - 1)], output)
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [2, 8])
def test_ragged_exchange(shards: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert.jax.lax, "ragged_all_to_all", emulated_ragged_all_to_all)
    check(placement(shards, ragged=True), choices(kind))


def test_sort_by_expert_is_stable() -> None:
    found = expert.sort_by_expert(jnp.array([2, 0, 2, 3, 0, 2]), 3)
    assert found.order.tolist() == [1, 4, 0, 2, 5, expert.NO_ROW]
    assert found.position.tolist() == [2, 0, 3, expert.NO_ROW, 1, 4]
    assert found.counts.tolist() == [2, 0, 3]


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_accelerators_use_ragged_all_to_all(platform: str) -> None:
    mesh, spec = abstract_mesh(MeshConfig(fsdp=1, expert=4)), PartitionSpec("expert")
    x = jax.ShapeDtypeStruct((4 * 128, 256), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    experts = jax.ShapeDtypeStruct((4 * 128, CHOICES), jnp.int32, sharding=NamedSharding(mesh, spec))

    def run(x: jax.Array, experts: jax.Array) -> jax.Array:
        return dispatch_and_combine(placement(4, max_rows=256, ragged=True), x, experts, jnp.ones(EXPERTS))

    with jax.sharding.use_abstract_mesh(mesh):
        mapped = jax.jit(jax.shard_map(run, in_specs=(spec, spec), out_specs=spec))
        text = mapped.trace(x, experts).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@ragged_all_to_all(") == 2
    assert "stablehlo.all_to_all" not in text
