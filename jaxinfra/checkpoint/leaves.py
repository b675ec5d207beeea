"""Names, types and shardings of the leaves of a state.

A leaf's name is its path, such as `params.layers.w`. It is the same for dicts, tuples and named tuples, and is the name
that a checkpoint stores.
"""

import math

import jax
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding

type PyTree = object  # of arrays, or of anything with a shape and a dtype


def leaf_types(tree: PyTree) -> dict[str, str]:
    """Returns the type of each leaf by name, such as "bfloat16[8,128]", with the global shape."""
    return {
        _name(path): f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def first_difference(saved: dict[str, str], wanted: dict[str, str]) -> str | None:
    """Describes the first leaf with another type, or on one side only; None if all leaves have equal types."""
    for name, leaf_type in wanted.items():
        if name not in saved:
            return f"{name} is {leaf_type} in this run and not in the checkpoint"
        if saved[name] != leaf_type:
            return f"{name} is {leaf_type} in this run and {saved[name]} in the checkpoint"
    for name, leaf_type in saved.items():
        if name not in wanted:
            return f"{name} is {leaf_type} in the checkpoint and not in this run"
    return None


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all leaves; a replicated array counts once."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def with_concrete_shardings[T](abstract: T) -> T:
    """Replaces the abstract mesh in shardings, which `jax.eval_shape` makes, by the mesh of `jax.set_mesh`.

    The leaves are `jax.ShapeDtypeStruct`. Raises ValueError for a leaf without a sharding, or with another mesh.
    """
    return jax.tree_util.tree_map_with_path(_with_concrete_sharding, abstract)


def _with_concrete_sharding(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding
    if sharding is None:
        raise ValueError(f"{_name(path)}: has no sharding; set one for each leaf to restore")
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
        return leaf
    mesh = jax.sharding.get_mesh()
    if mesh.empty or mesh.abstract_mesh.shape_tuple != sharding.mesh.shape_tuple:
        raise ValueError(
            f"{_name(path)}: its sharding is on an abstract mesh of {dict(sharding.mesh.shape)}, "
            f"but the current mesh is {dict(mesh.shape)}; restore under jax.set_mesh of that mesh"
        )
    concrete = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=concrete)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
