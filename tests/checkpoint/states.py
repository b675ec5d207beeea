"""Train states for the tests of checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfra.parallel import mesh
from jaxinfra.parallel.mesh_config import MeshConfig

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


class State(NamedTuple):
    step: Any
    params: Any
    optimizer: Any
    ema: Any = None


def make_mesh(*, fsdp: int = 1, tensor: int = 1) -> Mesh:
    return mesh.make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor), jax.devices()[: fsdp * tensor])


def spec_of(leaf: Any) -> PartitionSpec:
    """Shards matrices over both axes, and replicates all other arrays."""
    return PartitionSpec("fsdp", "tensor") if leaf.ndim == 2 else PartitionSpec()


def make_state(mesh: Mesh, *, seed: int = 0, width: int = 16, ema: bool = False) -> State:
    key = jax.random.key(seed)
    params = {
        "embed": jax.random.normal(key, (32, width)),
        "layers": {
            "in": jax.random.normal(jax.random.fold_in(key, 1), (width, 64), jnp.bfloat16),
            "norm": jax.random.normal(jax.random.fold_in(key, 2), (width,)),
        },
    }
    optimizer = OPTIMIZER.init(params)
    grown = jax.tree.map(lambda leaf: leaf + jnp.asarray(seed + 1, leaf.dtype), optimizer)
    average = jax.tree.map(lambda leaf: leaf * 2, params) if ema else None
    state = State(step=jnp.asarray(seed, jnp.int32), params=params, optimizer=grown, ema=average)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec_of(leaf))), state)


def abstract[T](tree: T, mesh: Mesh) -> T:
    def on_mesh(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec_of(leaf)))

    return jax.tree.map(on_mesh, tree)


def snapshot[T](tree: T) -> T:
    """Copies all arrays to the host; the copies share no memory with them."""
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same(found: Any, expected: Any) -> None:
    """Compares structure, dtypes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        left, right = np.asarray(left), np.asarray(right)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert left.tobytes() == right.tobytes()
