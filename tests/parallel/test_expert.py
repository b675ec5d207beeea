"""Tokens reach the experts that they choose and come home, on any number of shards, by either form of the transfer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.parallel import expert
from jaxinfra.parallel.expert import ExpertDispatch, ExpertPlacement, plan_dispatch
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig

TOKENS, CHOICES, EXPERTS, WIDTH = 6, 2, 8, 3
"""Tokens of one of eight devices."""


def choices(kind: str) -> np.ndarray:
    """Experts of the tokens of eight devices; `EXPERTS` stands for none."""
    draw, rows = np.random.default_rng(0), 8 * TOKENS
    if kind == "all choose two":
        return np.tile(np.array([3, 2], np.int32), (rows, 1))
    found = np.stack([draw.permutation(EXPERTS)[:CHOICES] for _ in range(rows)]).astype(np.int32)
    return np.where(draw.random(found.shape) < {"some are dropped": 0.2, "all are dropped": 1.0}.get(kind, 0), 8, found)


def placement(shards: int, **changes: Any) -> ExpertPlacement:
    axes = ("expert",) if shards > 1 else ()
    most = TOKENS * min(CHOICES, EXPERTS // shards)
    return replace(ExpertPlacement(num_experts=EXPERTS, axes=axes, num_shards=shards, max_rows=most), **changes)


def there_and_back(where: ExpertPlacement, x_ND: jax.Array, experts_NK: jax.Array, weights_E: jax.Array) -> jax.Array:
    """Every expert multiplies by its own number: what each token gets for each choice, on one device."""
    plan: ExpertDispatch = plan_dispatch(where, experts_NK)
    rows_MD = plan.dispatch(x_ND)
    own = jax.lax.axis_index(where.axes) * where.experts_per_shard if where.axes else 0
    of_row = own + jnp.searchsorted(jnp.cumsum(plan.group_sizes), jnp.arange(len(rows_MD)), side="right")
    return plan.combine(rows_MD * weights_E[jnp.minimum(of_row, EXPERTS - 1)][:, None])


def check(where: ExpertPlacement, experts: np.ndarray) -> None:
    """What comes home, and its gradient, against the same without any way."""
    shards, draw = where.num_shards, np.random.default_rng(1)
    mesh = make_mesh(MeshConfig(fsdp=8 // shards, expert=shards), jax.devices())
    spread = PartitionSpec(tuple(axis for axis in ("fsdp", "expert") if mesh.shape[axis] > 1))
    x = draw.normal(size=(len(experts), WIDTH)).astype(np.float32)
    dy = draw.normal(size=(*experts.shape, WIDTH)).astype(np.float32)
    numbers = np.arange(1, EXPERTS + 1, dtype=np.float32)
    factor = np.where(experts < EXPERTS, np.append(numbers, 0)[experts], 0)[..., None]
    with jax.set_mesh(mesh):
        put = [jax.device_put(a, NamedSharding(mesh, spread)) for a in (x, experts, dy)]

        def run(x: jax.Array, experts: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, pull = jax.vjp(lambda x: there_and_back(where, x, experts, jnp.asarray(numbers)), x)
            return y, pull(dy)[0]

        y, dx = jax.jit(jax.shard_map(run, in_specs=(spread,) * 3, out_specs=(spread, spread)))(*put)
    np.testing.assert_allclose(y, factor * x[:, None], rtol=1e-6)
    np.testing.assert_allclose(dx, (factor * dy).sum(1), atol=1e-5)


KINDS = ("even", "some are dropped", "all choose two", "all are dropped")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_tokens_come_home_from_their_experts(shards: int, kind: str) -> None:
    check(placement(shards), choices(kind))


def by_definition(operand, output, *way: jax.Array, axis_name: Sequence[str]) -> jax.Array:
    """`jax.lax.ragged_all_to_all` out of what CPUs have."""
    every, ways = jax.lax.all_gather(operand, axis_name), [jax.lax.all_gather(a, axis_name) for a in way]
    me, shards = jax.lax.axis_index(axis_name), len(every)
    parts = len(way[0]) // shards
    for source in range(shards):
        for part in range(parts):
            start, size, out = (a[source, me * parts + part] for a in ways[:3])
            place = jnp.arange(len(output)) - out
            there = (place >= 0) & (place < size)
            output = jnp.where(there[:, None], every[source][jnp.clip(start + place, 0, len(operand) - 1)], output)
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [2, 8])
def test_parts_of_unequal_size_carry_the_same(shards: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs have no such transfer: here it is made of others."""
    monkeypatch.setattr(expert.jax.lax, "ragged_all_to_all", by_definition)
    check(placement(shards, ragged=True), choices(kind))


def test_the_order_of_one_experts_rows_is_that_of_devices_and_tokens() -> None:
    found = expert.sort_by_expert(jnp.array([2, 0, 2, 3, 0, 2]), 3)
    assert found.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert found.position.tolist() == [2, 0, 3, 5, 1, 4]
    assert found.counts.tolist() == [2, 0, 3]


def test_tpus_send_parts_of_unequal_size() -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=1, expert=4))
    spread = NamedSharding(mesh, PartitionSpec("expert"))
    x = jax.ShapeDtypeStruct((4 * 128, 256), jnp.bfloat16, sharding=spread)
    experts = jax.ShapeDtypeStruct((4 * 128, CHOICES), jnp.int32, sharding=spread)

    def run(x: jax.Array, experts: jax.Array) -> jax.Array:
        where = ExpertPlacement(num_experts=EXPERTS, axes=("expert",), num_shards=4, max_rows=256, ragged=True)
        return there_and_back(where, x, experts, jnp.ones(EXPERTS))

    with jax.sharding.use_abstract_mesh(mesh):
        spec = PartitionSpec("expert")
        mapped = jax.jit(jax.shard_map(run, in_specs=(spec, spec), out_specs=spec))
        text = mapped.trace(x, experts).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@ragged_all_to_all(") == 2
    assert "stablehlo.all_to_all" not in text
