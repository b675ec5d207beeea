"""Weights that are not trained, in int8 or NF4, and multiplied in the compute dtype.

Both formats are those of bitsandbytes, up to the order of dimensions.

- int8: one scale for each output feature, the largest magnitude, so that it becomes 127 (LLM.int8(), Dettmers et al.
  2022).
- NF4: 16 numbers at quantiles of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E), one scale for each
  block of 64 numbers along the last input dimension. Two codes are in a byte, the first one in its upper half.

Devices gather codes and scales, and compute the weight from them wherever it is used: once in a forward pass and, with
rematerialization, once more in the backward pass.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxinfra.parallel.rules import LogicalAxes, Packed
from jaxinfra.parallel.sharding import GATHERED_WEIGHT, STAGES, Partitioner, SpecEntry, axes_by_dim

BLOCK = 64
"""Numbers of NF4 that share a scale."""

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
# fmt: on


def packed_shapes(shape: Sequence[int], in_dims: Sequence[int], packed: Packed) -> tuple[list[int], list[int]]:
    """Returns the shapes of codes and scales of a weight that contracts `in_dims`."""
    codes, scales = list(shape), list(shape)
    if packed == "int8":
        for dim in in_dims:
            scales[dim] = 1
        return codes, scales
    dim = in_dims[-1]
    codes[dim] //= 2
    scales[dim] //= block_size(shape[dim])
    return codes, scales


def block_size(size: int) -> int:
    """Returns how many numbers share a scale of NF4: 64, or fewer in a dimension that 64 does not divide."""
    return math.gcd(size, BLOCK)


def pack(weight: jax.Array, in_dims: Sequence[int], packed: Packed) -> tuple[jax.Array, jax.Array]:
    """Returns codes (int8, or uint8 with two of NF4) and scales (float32) of a weight, as `packed_shapes` says.

    In a `shard_map` the weight is a part, of whole blocks.
    """
    weight = weight.astype(jnp.float32)
    if packed == "int8":
        scale = jnp.max(jnp.abs(weight), axis=tuple(in_dims), keepdims=True)
        codes = jnp.round(weight * (127 / jnp.where(scale == 0, 1, scale)))
        return codes.astype(jnp.int8), scale
    dim = in_dims[-1]
    blocks = _split(weight, dim, block_size(weight.shape[dim]))
    scale = jnp.max(jnp.abs(blocks), axis=dim + 1, keepdims=True)
    between = (NF4[1:] + NF4[:-1]) / 2
    codes = jnp.searchsorted(between, blocks / jnp.where(scale == 0, 1, scale), method="compare_all")
    first, second = jnp.split(_split(codes.reshape(weight.shape).astype(jnp.uint8), dim, 2), 2, axis=dim + 1)
    return jnp.squeeze(first << 4 | second, dim + 1), jnp.squeeze(scale, dim + 1)


def pack_onto(
    weight: jax.Array, in_dims: Sequence[int], shapes: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
) -> tuple[jax.Array, jax.Array]:
    """Packs a weight into arrays of these shapes, dtypes and shardings, whose numbers do not depend on the mesh."""
    packed: Packed = "int8" if shapes[0].dtype == jnp.int8 else "nf4"
    codes, scale = (each.sharding.spec for each in shapes)
    fun, cut = partial(pack, in_dims=in_dims, packed=packed), jax.typeof(weight).sharding.spec
    if packed == "nf4":  # parts have whole blocks, or else the dimension is gathered
        parts: list[SpecEntry] = [tuple(axes) or None for axes in axes_by_dim(codes, weight.ndim)]
        if not axes_by_dim(scale, weight.ndim)[in_dims[-1]]:
            parts[in_dims[-1]] = None
        cut = PartitionSpec(*parts)
        fun = jax.shard_map(fun, in_specs=cut, out_specs=cut)
    return jax.jit(lambda weight: tuple(map(jax.reshard, fun(jax.reshard(weight, cut)), (codes, scale))))(weight)


def unpack(codes: jax.Array, scale: jax.Array, in_dim: int, dtype: jnp.dtype) -> jax.Array:
    """Inverts `pack`, up to rounding; `in_dim` is the last one of `in_dims`."""
    if codes.dtype == jnp.int8:
        return (codes * (scale * np.float32(1 / 127))).astype(dtype)
    both = jnp.stack([codes >> 4, codes & 15], axis=in_dim + 1)
    shape = (*codes.shape[:in_dim], 2 * codes.shape[in_dim], *codes.shape[in_dim + 1 :])
    blocks = _split(_number(both.reshape(shape)), in_dim, shape[in_dim] // scale.shape[in_dim])
    return (blocks * jnp.expand_dims(scale, in_dim + 1)).reshape(shape).astype(dtype)


def _number(codes: jax.Array) -> jax.Array:
    """Returns the number of each code, float32: by 15 choices, since lookups in a table are slow on TPUs."""
    numbers: list[np.float32 | jax.Array] = list(NF4)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        numbers = [jnp.where(is_set, odd, even) for even, odd in zip(numbers[::2], numbers[1::2], strict=True)]
    (number,) = numbers
    return jnp.asarray(number)


def _split(array: jax.Array, dim: int, size: int) -> jax.Array:
    """Splits a dimension into blocks: `[..., n, ...]` becomes `[..., n / size, size, ...]`."""
    return array.reshape(*array.shape[:dim], -1, size, *array.shape[dim + 1 :])


def gather_packed(
    partitioner: Partitioner,
    codes: jax.Array,
    scale: jax.Array,
    names: LogicalAxes,
    activation_axes: LogicalAxes,
    *,
    in_dim: int,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """Gathers codes and scales of a stored weight, and returns the weight as `Partitioner.gather_weight` does.

    `in_dim` is the last input dimension among `names`.
    """
    if codes.ndim > len(names):
        names, in_dim = (STAGES, *names), in_dim + 1
    used = partitioner.compute_spec(names, activation_axes)
    whole = used.update(reduced=frozenset())
    of_scale = whole.update(
        partitions=[None if size == 1 else part for size, part in zip(scale.shape, whole.partitions, strict=True)]
    )
    found = jax.shard_map(
        lambda codes, scale: unpack(codes, scale, in_dim, dtype or partitioner.compute_dtype),
        in_specs=(whole, of_scale),
        out_specs=whole,
    )(jax.reshard(codes, whole), jax.reshard(scale, of_scale))
    return checkpoint_name(jax.reshard(found, used), GATHERED_WEIGHT)
