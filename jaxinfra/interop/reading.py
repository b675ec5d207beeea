"""Reads the parameters of a model from a folder of safetensors onto a mesh, each process its own part.

The tensors of a checkpoint are read in runs of consecutive bytes: a parameter is split over the devices along what is
outermost in the files: layers, experts, then rows. The devices transpose what was read, and exchange it if the
parameter is stored with another sharding. So the files are read once, whatever the mesh, and a process holds no more
than its part of two parameters: one that is transposed, and the next one, which a thread reads meanwhile.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import ConfigError, quoted
from jaxinfra.interop.pattern import Layout
from jaxinfra.interop.rules import Binding, BoundPart, nearest
from jaxinfra.interop.safetensors import StoredTensor, Weights
from jaxinfra.parallel.sharding import axis_names

PLAIN_DTYPES = ("bfloat16", "float16", "float32", "float64")
_READERS = 16  # threads: a bucket answers many requests at once


type Keep = Callable[[str, jax.Array], dict[str, jax.Array]]
"""Takes a parameter by its path, and returns what is kept of it by path."""


def check_tensors(
    tensors: Mapping[str, StoredTensor], bindings: Iterable[Binding], unused: Sequence[str], where: str
) -> None:
    """Raises ConfigError for a tensor that is missing, left over, or of another shape, naming the nearest one."""
    # A copy may be missing.
    named = ((name, binding) for binding in bindings for name in binding.names)
    expected = {name: binding.shape for name, binding in named if name in tensors or not binding.is_copy}
    left_over = [name for name in tensors if name not in expected and not any(fnmatchcase(name, p) for p in unused)]
    for name, shape in expected.items():
        if name not in tensors:
            hint = nearest(name, left_over)
            raise ConfigError(f"{where}: {name} is missing{hint}; by {where}/config.json the model has it")
        if (found := tensors[name].shape) != shape:
            text, by_config = ("x".join(map(str, sizes)) for sizes in (found, shape))
            raise ConfigError(f"{where}: {name} is {quoted(text)}, but by its config.json {by_config}")
        if str(dtype := tensors[name].dtype) not in PLAIN_DTYPES:
            raise ConfigError(f"{where}: {name} is stored as {dtype}; weights must be {', '.join(PLAIN_DTYPES)}")
    if left_over:
        name, count = left_over[0], len(left_over)
        more = f"; there are {count - 1} more" if count > 1 else ""
        raise ConfigError(
            f"{where}: {name} has no place in the model of its config.json{nearest(name, expected)}{more}"
        )


def read_params(
    weights: Weights,
    bindings: Iterable[Binding],
    params: Mapping[str, jax.ShapeDtypeStruct],
    keep: Keep = lambda path, array: {path: array},
) -> dict[str, jax.Array]:
    """Reads parameters, by path, with the dtypes and shardings of `params`; all processes must call it."""
    found = dict[str, jax.Array]()
    groups = [(binding, parts) for binding in bindings if not binding.is_copy for parts in binding.groups]
    # A thread reads the next rows while the devices transpose these; waiting for them keeps third ones out of memory.
    with ThreadPoolExecutor(1) as pool:
        reads = (pool.submit(_read_parts, weights, *group, params) for group in groups)
        ahead = next(reads, None)
        while ahead is not None:
            place = ahead.result()
            ahead = next(reads, None)
            placed = jax.block_until_ready(place())
            for path, array in placed.items():
                found |= keep(path, array)
    return found


def _read_parts(
    weights: Weights, binding: Binding, parts: Sequence[BoundPart], params: Mapping[str, jax.ShapeDtypeStruct]
) -> Callable[[], dict[str, jax.Array]]:
    """Reads the rows of one part, or of all that alternate; returns what takes the parameters out of them."""
    layout, lead = parts[0].layout, binding.lead
    target = params[parts[0].path].sharding
    assert isinstance(target, NamedSharding) and isinstance(target.mesh, Mesh)
    start, stop = layout.rows(0, layout.cut_size)
    shape, read = (*lead, stop - start, *layout.shape[1:]), dict[str, np.ndarray]()
    dtypes = {weights.tensors[name].dtype for name in binding.names}
    dtype = reduce(jnp.promote_types, dtypes)  # layers may be stored in unlike dtypes

    def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
        if (key := str(index)) not in read:  # several devices may have the same
            ranges = [cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True)]
            first, end = ranges[len(lead)]
            read[key] = _read_rows(weights, binding, ranges[: len(lead)], (start + first, start + end), dtype)
        return read[key]

    order = file_order(target, lead, layout)
    sharding = NamedSharding(target.mesh, order.read)
    for index in sharding.addressable_devices_indices_map(shape).values():
        read_shard(index)

    def place() -> dict[str, jax.Array]:
        raw, found = jax.make_array_from_callback(shape, sharding, read_shard), dict[str, jax.Array]()
        for part in parts:
            spec = params[part.path]
            assert isinstance(spec.sharding, NamedSharding)
            found[part.path] = _to_ours(raw, part.layout, order.whole, spec.dtype, spec.sharding.spec)
        return found

    return place


def _read_rows(
    weights: Weights, binding: Binding, lead: Sequence[tuple[int, int]], rows: tuple[int, int], dtype: np.dtype
) -> np.ndarray:
    """Reads rows of the tensors of some layers and experts."""
    ranges = [range(*each) for each in lead]
    names = [*map(binding.name, itertools.product(*ranges))]
    out = _aligned((len(names), rows[1] - rows[0], *binding.shape[1:]), dtype)

    def read(name: str, own: np.ndarray) -> None:
        stored = weights.tensors[name].dtype
        found = own if stored == dtype else np.empty(own.shape, stored)
        weights.read_into(name, rows[0], found)
        if found is not own:
            own[...] = found.astype(dtype)

    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(read, names, out))  # raises the first error
    return out.reshape(*map(len, ranges), *out.shape[1:])


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array that JAX uses on CPUs as it is, without a copy: one that begins at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + nbytes].view(dtype).reshape(shape)


class FileOrder(NamedTuple):
    """How rows `[*lead, *rows]` are sharded, so that each device has a run of consecutive bytes of the files."""

    read: P  # the sharding in which they are read or written
    whole: P  # the same without the axes that cut through an outermost factor, such as a head


def file_order(target: NamedSharding, lead: Sequence[int], layout: Layout) -> FileOrder:
    """Returns how rows of a parameter are sharded; `target` is the sharding of the parameter.

    Axes that can stay in their dimension come first, then those that move from another one, then those along which
    parameters are copies. Devices along an axis that divides neither layers, experts nor rows have the same.
    """
    sizes = [*lead, layout.cut_size if layout.cut_dim is not None else 1]
    ours = [*range(len(lead)), None if layout.cut_dim is None else len(lead) + layout.cut_dim]
    wanted = _axes_of(target.spec, len(lead) + len(layout.pattern.ours))
    mesh = target.mesh.shape
    axes = {name: count for name, count in mesh.items() if count > 1}
    chosen = [list[str]() for _ in sizes]
    moving = [name for names in wanted for name in names]

    def choose(index: int, size: int, names: Iterable[str]) -> None:
        for name in names:
            taken = math.prod(mesh[other] for other in chosen[index])
            if name in axes and size % (taken * axes[name]) == 0:
                del axes[name]
                chosen[index].append(name)

    for choice in (None, moving, list(axes)):
        for index, size in enumerate(sizes):
            staying = [] if (dim := ours[index]) is None else wanted[dim]
            choose(index, size, staying if choice is None else choice)
    whole = _spec_of(chosen)
    start, stop = layout.rows(0, layout.cut_size)
    choose(len(lead), stop - start, list(axes))
    return FileOrder(_spec_of(chosen), whole)


def _spec_of(axes: Iterable[Sequence[str]]) -> P:
    return P(*(tuple(names) or None for names in axes))


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _to_ours(raw: jax.Array, layout: Layout, whole: P, dtype: jnp.dtype, target: P) -> jax.Array:
    """Returns the parameter of rows `[*lead, *rows]`, in its dtype and sharding."""
    lead = raw.ndim - len(layout.shape)
    ours = parameter_spec(whole, lead, layout)
    values = jax.shard_map(layout.to_ours, in_specs=whole, out_specs=ours)(jax.reshard(raw, whole))
    return reshard(values, target).astype(dtype)


def parameter_spec(rows: P, lead: int, layout: Layout) -> P:
    """Returns the sharding of a parameter whose rows in the files have the sharding `rows`."""
    axes = [None] * len(layout.pattern.ours)
    if layout.cut_dim is not None and len(rows) > lead:
        axes[layout.cut_dim] = rows[lead]
    return P(*rows[:lead], *axes)


def reshard(array: jax.Array, target: P) -> jax.Array:
    """Changes the sharding of an array by one mesh axis after another, each an all-to-all or an all-gather.

    In one step the compiler would gather the whole array on each device where several axes move.
    """
    current, wanted = (_axes_of(spec, array.ndim) for spec in (jax.typeof(array).sharding.spec, target))
    while (moved := _move_axis(current, wanted)) is not None:
        current = moved
        array = jax.reshard(array, _spec_of(current))
    return jax.reshard(array, target)


def _move_axis(current: list[list[str]], wanted: list[list[str]]) -> list[list[str]] | None:
    """Moves one mesh axis, the minor one of its dimension, to where it is wanted; None if there is none to move."""
    for dim, names in enumerate(current):
        if not names or names == wanted[dim][: len(names)]:
            continue
        name, moved = names[-1], [list(each) for each in current]
        moved[dim].pop()
        other = next((index for index, each in enumerate(wanted) if name in each), None)
        if other is None:
            return moved
        if wanted[other][: len(moved[other]) + 1] == [*moved[other], name]:
            moved[other].append(name)
            return moved
    return None


def _axes_of(spec: P, ndim: int) -> list[list[str]]:
    """Returns the mesh axes that shard each dimension, major ones first."""
    parts = [*spec, *[None] * (ndim - len(spec))]
    return [list(axis_names(part)) for part in parts]
