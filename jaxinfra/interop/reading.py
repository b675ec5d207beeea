"""Reads the parameters of a model from a folder of safetensors onto a mesh, each process its own part.

The tensors of a checkpoint are read in runs of consecutive bytes: a parameter is split over the devices along what is
outermost in the files: layers, experts, then rows. The devices transpose what was read, and exchange it if the
parameter is stored with another sharding. So the files are read once, whatever the mesh, and a process holds no more
than its part of one parameter.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfra.errors import ConfigError
from jaxinfra.interop.pattern import Layout
from jaxinfra.interop.rules import Binding, BoundPart, nearest
from jaxinfra.interop.safetensors import StoredTensor, Weights
from jaxinfra.parallel.sharding import axis_names

_READERS = 16  # threads: a bucket answers many requests at once


def check_tensors(
    tensors: Mapping[str, StoredTensor], bindings: Iterable[Binding], unused: Sequence[str], where: str
) -> None:
    """Raises ConfigError for a tensor that is missing, left over, or of another shape, naming the nearest one."""
    expected = {name: binding.shape for binding in bindings for name in binding.names}
    left_over = [name for name in tensors if name not in expected and not any(fnmatchcase(name, p) for p in unused)]
    for name, shape in expected.items():
        if name not in tensors:
            hint = nearest(name, left_over)
            raise ConfigError(f"{where}: {name} is missing{hint}; by {where}/config.json the model has it")
        if (found := tensors[name].shape) != shape:
            text, by_config = ("x".join(map(str, sizes)) for sizes in (found, shape))
            raise ConfigError(f"{where}: {name} is {text}, but by its config.json {by_config}")
    if left_over:
        name, count = left_over[0], len(left_over)
        more = f"; there are {count - 1} more" if count > 1 else ""
        raise ConfigError(
            f"{where}: {name} has no place in the model of its config.json{nearest(name, expected)}{more}"
        )


def read_params(
    weights: Weights, bindings: Iterable[Binding], params: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads parameters, by path, with the dtypes and shardings of `params`; all processes must call it."""
    parts = ((binding, part) for binding in bindings for part in binding.parts)
    return {part.path: _read_param(weights, binding, part, params[part.path]) for binding, part in parts}


def _read_param(weights: Weights, binding: Binding, part: BoundPart, param: jax.ShapeDtypeStruct) -> jax.Array:
    target, layout, lead = param.sharding, part.layout, binding.lead
    assert isinstance(target, NamedSharding) and isinstance(target.mesh, Mesh)
    first, end = layout.rows(0, layout.cut_size)
    shape, read = (*lead, end - first, *layout.shape[1:]), dict[str, np.ndarray]()

    def read_shard(index: tuple[slice, ...] | None) -> np.ndarray:
        if (key := str(index)) not in read:  # several devices may have the same
            *stacked, rows = [cut.indices(size)[:2] for cut, size in zip(index or (), shape, strict=True)][
                : len(lead) + 1
            ]
            read[key] = _read_rows(weights, binding, stacked, (first + rows[0], first + rows[1]))
        return read[key]

    spec = file_order(target, lead, layout)
    raw = jax.make_array_from_callback(shape, NamedSharding(target.mesh, spec), read_shard)
    return _to_ours(raw, layout, param.dtype, target.spec)


def _read_rows(
    weights: Weights, binding: Binding, lead: Sequence[tuple[int, int]], rows: tuple[int, int]
) -> np.ndarray:
    """Reads rows of the tensors of some layers and experts."""
    ranges = [range(*each) for each in lead]
    names = [_name(binding, index) for index in itertools.product(*ranges)]
    out = _aligned((len(names), rows[1] - rows[0], *binding.shape[1:]), weights.tensors[names[0]].dtype)
    with ThreadPoolExecutor(_READERS) as pool:
        list(pool.map(lambda name, own: weights.read_into(name, rows[0], own), names, out))  # raises the first error
    return out.reshape(*map(len, ranges), *out.shape[1:])


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Returns an array that JAX uses on CPUs as it is, without a copy: one that begins at a multiple of 64 bytes."""
    nbytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(nbytes + 64, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + nbytes].view(dtype).reshape(shape)


def _name(binding: Binding, index: Sequence[int]) -> str:
    layer = index[0] if binding.layers is not None else 0
    return binding.name(layer, index[-1] if binding.experts is not None else 0)


def file_order(target: NamedSharding, lead: Sequence[int], layout: Layout) -> P:
    """Returns the sharding of rows `[*lead, *rows]` that gives each device a run of consecutive bytes.

    Devices along a mesh axis that divides neither layers, experts nor rows have the same. Axes that can stay in their
    dimension come first, then those that move from another one, then those along which parameters are copies.
    """
    sizes = [*lead, layout.cut_size if layout.cut_dim is not None else 1]
    ours = [*range(len(lead)), None if layout.cut_dim is None else len(lead) + layout.cut_dim]
    wanted = _axes_of(target.spec, len(lead) + len(layout.pattern.ours))
    axes = {name: count for name, count in target.mesh.shape.items() if count > 1}
    chosen = [list[str]() for _ in sizes]
    moving = [name for names in wanted for name in names]
    for choice in (None, moving, list(axes)):
        for index, size in enumerate(sizes):
            dim = ours[index]
            staying = wanted[dim] if dim is not None else []
            for name in staying if choice is None else choice:
                taken = math.prod(target.mesh.shape[other] for other in chosen[index])
                if name in axes and size % (taken * axes[name]) == 0:
                    del axes[name]
                    chosen[index].append(name)
    return P(*(tuple(names) or None for names in chosen))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _to_ours(raw: jax.Array, layout: Layout, dtype: jnp.dtype, target: P) -> jax.Array:
    """Returns the parameter of rows `[*lead, *rows]`, in its dtype and sharding."""
    spec, lead = jax.typeof(raw).sharding.spec, raw.ndim - len(layout.shape)
    ours = parameter_spec(spec, lead, layout)
    values = jax.shard_map(layout.to_ours, in_specs=spec, out_specs=ours)(raw)
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
        array = jax.reshard(array, P(*(tuple(names) or None for names in current)))
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
