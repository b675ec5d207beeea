"""The leaves of a state by name: compare those of a checkpoint with those of a run, and say where they go.

Not for values: only names, shapes, data types and shardings. A leaf is named by its path, `params.layers.w`,
which is the same for dicts, tuples and named tuples and is what the checkpoint stores.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding


def leaf_types(tree: Any) -> dict[str, str]:
    """The types of all leaves of `tree` by name, such as "bfloat16[8,128]" (of the whole array), in its order."""
    return {
        _name(path): f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def first_difference(saved: dict[str, str], wanted: dict[str, str]) -> str | None:
    """What is different about the first leaf that is not the same in both, or None."""
    for name, leaf in wanted.items():
        if name not in saved:
            return f"{name} is {leaf} in this run and not in the checkpoint"
        if saved[name] != leaf:
            return f"{name} is {leaf} in this run and {saved[name]} in the checkpoint"
    for name, leaf in saved.items():
        if name not in wanted:
            return f"{name} is {leaf} in the checkpoint and not in this run"
    return None


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves of `tree` (of anything with a shape and a dtype), each counted once."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def with_concrete_shardings[T](abstract: T) -> T:
    """`abstract` with every sharding on real devices.

    The leaves are `jax.ShapeDtypeStruct`. `jax.eval_shape` under `jax.set_mesh` gives shardings on an abstract mesh,
    which names no devices; they become shardings on the mesh that is set. ValueError for a leaf without a sharding, or
    with one on another abstract mesh.
    """
    return jax.tree_util.tree_map_with_path(_on_devices, abstract)


def _on_devices(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if sharding is None:
        raise ValueError(f"{_name(path)}: no sharding; say where the restored array goes")
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
        return leaf
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh.shape_tuple != sharding.mesh.shape_tuple:
        raise ValueError(
            f"{_name(path)}: sharding on an abstract mesh of {dict(sharding.mesh.shape)}, "
            f"but the mesh that is set is {dict(mesh.shape)}; restore under jax.set_mesh of that mesh"
        )
    concrete = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=concrete)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
