"""Reads the parameters of a model from a folder of safetensors onto a mesh, each process its own part.

The tensors of a checkpoint are read in runs of consecutive bytes. So a parameter is read with a sharding that splits
what is outermost in the file: layers, experts, then rows. If it is stored with another sharding, the devices exchange
it: the files are read once, whatever the mesh, and a process holds no more than its part of one parameter.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.interop.rules import Binding, BoundPart, nearest
from jaxinfra.interop.safetensors import StoredTensor, Weights


def check_tensors(
    weights: Mapping[str, StoredTensor], bindings: Iterable[Binding], unused: Sequence[str], where: str
) -> None:
    """Raises ConfigError for a tensor that is missing, left over, or of another shape, naming the nearest one."""
    expected = {name: binding.shape for binding in bindings for name in binding.names}
    left_over = [name for name in weights if name not in expected and not any(fnmatchcase(name, p) for p in unused)]
    for name, shape in expected.items():
        if name not in weights:
            raise ConfigError(
                f"{where}: {name} is missing{nearest(name, left_over)}; the config says that the model has it"
            )
        if weights[name].shape != shape:
            found = "x".join(map(str, weights[name].shape))
            raise ConfigError(f"{where}: {name} is {found}, but by the config {'x'.join(map(str, shape))}")
    if left_over:
        name = left_over[0]
        raise ConfigError(
            f"{where}: {name} is not used by the model of the config{nearest(name, expected)}; "
            f"{len(left_over)} such tensor{'s' * (len(left_over) > 1)}"
        )


def read_params(
    weights: Weights, bindings: Iterable[Binding], params: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads parameters, by path, with the dtypes and shardings of `params`; all processes must call it."""
    found = dict[str, jax.Array]()
    for binding in bindings:
        for part in binding.parts:
            found[part.path] = _read_param(weights, binding, part, params[part.path])
    return found


def _read_param(weights: Weights, binding: Binding, part: BoundPart, spec: jax.ShapeDtypeStruct) -> jax.Array:
    target = spec.sharding
    assert isinstance(target, NamedSharding)
    dtype = weights.tensors[binding.name()].dtype

    def read_shard(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [cut.indices(size)[:2] for cut, size in zip(index, spec.shape, strict=True)]
        return read_box(weights, binding, part, ranges, dtype)

    sharding = NamedSharding(target.mesh, file_order_spec(target.mesh, binding, part, spec.shape))
    array = jax.make_array_from_callback(spec.shape, sharding, read_shard)
    return convert(array, spec.dtype, target)


def read_box(
    weights: Weights, binding: Binding, part: BoundPart, ranges: Sequence[tuple[int, int]], dtype: np.dtype
) -> np.ndarray:
    """Reads ranges of a parameter from the tensors that have it."""
    shape = [stop - start for start, stop in ranges]
    box, rest = np.empty(shape, dtype), list(ranges)
    layers = range(*rest.pop(0)) if binding.layers is not None else range(1)
    experts = range(*rest.pop(part.expert)) if part.expert is not None else range(1)
    for layer, expert in itertools.product(layers, experts):
        name = binding.name(layer, expert)
        index: list[int | slice] = [] if binding.layers is None else [layer - layers.start]
        if part.expert is not None:
            index += [slice(None)] * part.expert + [expert - experts.start]
        tensor = weights.read(name, part.layout.box(tuple(rest)))
        box[tuple(index)] = part.layout.take(tensor, tuple(rest))
    return box


def file_order_spec(mesh: Mesh, binding: Binding, part: BoundPart, shape: Sequence[int]) -> PartitionSpec:
    """Returns the sharding that splits a parameter over all devices in runs of consecutive bytes of the files.

    An axis of the mesh that divides none of layers, experts and outermost rows has copies.
    """
    pattern, first = part.layout.pattern, 0 if binding.layers is None else 1
    dims = [(0, shape[0])] if binding.layers is not None else []
    if part.expert is not None:
        dims.append((first + part.expert, shape[first + part.expert]))
    names = [*pattern.ours]
    if part.expert is not None:
        names.insert(part.expert, ("",))
    outermost = part.layout.outermost
    dims += [
        (first + dim, part.layout.sizes[outermost]) for dim, factors in enumerate(names) if factors[0] == outermost
    ]
    axes = {name: size for name, size in mesh.shape.items() if size > 1}
    chosen: list[tuple[str, ...]] = [()] * len(shape)
    for dim, size in dims:
        for name in list(axes):
            taken = math.prod(mesh.shape[other] for other in chosen[dim])
            if size % (taken * axes[name]) == 0:
                chosen[dim] += (name,)
                del axes[name]
    return PartitionSpec(*(names or None for names in chosen))


def convert(array: jax.Array, dtype: jnp.dtype, sharding: NamedSharding) -> jax.Array:
    """Returns an array in another dtype and with another sharding on the same mesh; the array is given up."""
    if array.dtype == dtype and array.sharding.is_equivalent_to(sharding, array.ndim):
        return array
    return jax.jit(_as, static_argnums=(1, 2), donate_argnums=0)(array, dtype, sharding)


def _as(array: jax.Array, dtype: jnp.dtype, sharding: NamedSharding) -> Any:
    return jax.reshard(array.astype(dtype), sharding.spec)
