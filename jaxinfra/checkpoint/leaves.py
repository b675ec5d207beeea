"""Names and types of the leaves of a state, to compare a checkpoint with the state of a run; and its parts.

A leaf's name is its path, such as `params.layers.w` or `opt_state.0.mu`, whether its parents are dicts or tuples.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np

from jaxinfra.checkpoint.zarr_chunks import Index
from jaxinfra.parallel.spec import leaf_name, leaves_by_name

type PyTree = object  # of arrays, or of anything with a shape and a dtype


def leaf_types(tree: PyTree) -> dict[str, str]:
    """Returns the type of each leaf by name, such as "bfloat16[8,128]", with the global shape."""
    return {
        name: f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
        for name, leaf in leaves_by_name(tree).items()
    }


def split_parts(tree: PyTree) -> dict[str, Any]:
    """Splits a tree at its top into "params", "opt_state" and so on; a part without leaves is left out."""
    children = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return {leaf_name(path): child for path, child in children if jax.tree.leaves(child)}


def first_difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Describes the first leaf with another type, or on one side only; None if all leaves have equal types."""
    for name in {**wanted, **saved}:
        if wanted.get(name) != saved.get(name):
            in_run, in_checkpoint = wanted.get(name, "missing"), saved.get(name, "missing")
            return f"{name} is {in_run} in this run and {in_checkpoint} in the checkpoint"
    return None


def local_shards(leaf: jax.ShapeDtypeStruct) -> list[tuple[Index, list[Any]]]:
    """Returns the parts of an array that this process has, each with its devices, which are several for replicas."""
    devices: dict[str, tuple[Index, list[Any]]] = {}
    for device, index in cast(jax.sharding.Sharding, leaf.sharding).addressable_devices_indices_map(leaf.shape).items():
        assert index is not None
        devices.setdefault(str(index), (index, []))[1].append(device)
    return [*devices.values()]


def place(values: np.ndarray, leaf: jax.ShapeDtypeStruct, devices: Sequence[Any]) -> list[jax.Array]:
    """Copies a part of an array onto devices; returns once the values may be freed."""
    kind = cast(jax.sharding.Sharding, leaf.sharding).memory_kind
    places = [jax.sharding.SingleDeviceSharding(each, memory_kind=kind) for each in devices]
    values = values.astype(leaf.dtype, copy=False)
    return jax.block_until_ready([jax.device_put(values, each, may_alias=False) for each in places])


def from_shards(leaf: jax.ShapeDtypeStruct, shards: Sequence[jax.Array]) -> jax.Array:
    """Returns the array that has these parts on the devices of this process."""
    return jax.make_array_from_single_device_arrays(leaf.shape, cast(jax.sharding.Sharding, leaf.sharding), shards)


def pending_bytes(tree: PyTree) -> int:
    """Returns how many bytes of a state, of arrays with shardings, a process may read or write at once.

    They come on top of its share of the state, in host memory. With the share it grows, so that a large state has
    many reads under way, as a network needs.
    """
    own = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize * len(leaf.sharding.addressable_devices)
        for leaf in jax.tree.leaves(tree)
    )
    return (96 << 20) + own // 16


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all leaves; a replicated array counts once."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
