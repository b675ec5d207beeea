"""The order of positions on the shards of a sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig


def sharding(shards: int, *, zigzag: bool = True) -> SequenceSharding:
    return SequenceSharding(axes=("context",), num_shards=shards, zigzag=zigzag)


def test_each_shard_has_an_early_and_a_late_block() -> None:
    assert sharding(3).positions(12).tolist() == [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
    assert sharding(3, zigzag=False).positions(6).tolist() == [0, 1, 2, 3, 4, 5]
    assert sharding(1).positions(4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("zigzag", [True, False])
def test_block_index_agrees_with_positions(zigzag: bool) -> None:
    found = sharding(4, zigzag=zigzag)
    block = 32 // (4 * found.blocks_per_shard)
    shards = np.arange(4)
    starts = np.stack([found.block_index(shards, piece) * block for piece in range(found.blocks_per_shard)], axis=1)
    assert np.array_equal(starts.reshape(-1), np.asarray(found.positions(32))[::block])


@pytest.mark.parametrize("dim", [0, 1])
def test_natural_order_undoes_shard_order(dim: int) -> None:
    x = jnp.arange(16 * 16 * 3).reshape(16, 16, 3)
    arranged = sharding(4).to_shard_order(x, dim)
    assert np.array_equal(arranged, jnp.take(x, sharding(4).positions(16), axis=dim))
    assert np.array_equal(sharding(4).to_natural_order(arranged, dim), x)


@pytest.mark.parametrize("offset", [1, 3, -2, 4])
def test_rotate_sends_around_the_ring(offset: int) -> None:
    spec = PartitionSpec("context")
    with jax.set_mesh(mesh := make_mesh(MeshConfig(fsdp=1, context=4), jax.devices()[:4])):
        x = jax.device_put(jnp.arange(8), NamedSharding(mesh, spec))

        def rotate(x: jax.Array) -> jax.Array:
            return sharding(4).rotate(x, offset)

        found = jax.jit(jax.shard_map(rotate, in_specs=spec, out_specs=spec))(x)
    assert np.array_equal(found, np.roll(np.arange(8), 2 * offset))
