"""Stores optimizer state in fewer bits than it is computed in: bfloat16, rounded to nearest or at random, or 8 bits.

The 8-bit format is the blockwise dynamic one of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
with the numbers of bitsandbytes: each block has a float32 scale, its largest magnitude. A code counts the values that a
magnitude can have in ascending order. They fall into seven decades below 1; each higher decade has twice as many,
evenly spaced. So small values keep their size and large ones their digits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.tree_util import KeyPath

from jaxinfra.optim.config import StateDtype
from jaxinfra.parallel.sharding import axes_by_dim, local_shape
from jaxinfra.parallel.spec import PyTree

BLOCK = 256
"""Numbers that share a scale, as in bitsandbytes."""
MIN_BLOCK = 64
"""Arrays whose last dimension has no blocks of this size stay float32."""
MIN_SIZE = 4096
"""Smaller arrays stay float32, as in bitsandbytes."""
DECADES = 7
ZERO = 127
"""The code of zero among codes with a sign; -1 has none, the largest magnitude of a negative number is 0.996."""


class Blocks8(NamedTuple):
    """An array in 8 bits.

    Attributes:
        codes: uint8, of the array's shape and sharding.
        scales: the largest magnitude of each block of the last dimension, float32 `[..., last / block]`.
    """

    codes: jax.Array
    scales: jax.Array


def store_state_as(tx: optax.GradientTransformation, dtype: StateDtype) -> optax.GradientTransformation:
    """Wraps `tx` to store its floating-point state in `dtype` between steps, and to compute in float32.

    Updates are float32. Scalars and counters of the state are unchanged.
    """

    def init(params: optax.Params) -> optax.OptState:
        state = tx.init(_to_float32(params))
        return _store(state, dtype, [dtype == "8bit" and _has_blocks(x) for x in jax.tree.leaves(state)])

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # As stored before: the state of one layer of several may be smaller than `MIN_SIZE`.
        in_blocks = [_in_blocks(x) for x in jax.tree.leaves(state, is_leaf=_in_blocks)]
        loaded = jax.tree.map_with_path(_load, state, is_leaf=_in_blocks)
        updates, new_state = tx.update(_to_float32(updates), loaded, _to_float32(params))
        return updates, _store(new_state, dtype, in_blocks)

    return optax.GradientTransformation(init, update)


def _store(state: optax.OptState, dtype: StateDtype, in_blocks: list[bool]) -> optax.OptState:
    """Stores each array of a state in `dtype`; those in 8 bits that `in_blocks` names, and others in float32."""
    leaves, structure = jax.tree.flatten_with_path(state)
    # Another seed at each step, without a counter of its own: the learning rate's is always there.
    counters = (x for _, x in leaves if not x.ndim and jnp.issubdtype(x.dtype, jnp.integer))
    key = jax.random.fold_in(jax.random.key(0), next(counters, 0))

    def store(index: int, path: KeyPath, x: jax.Array) -> jax.Array | Blocks8:
        if not _is_floating(x):
            return x
        if in_blocks[index]:
            return to_blocks(x, signed=_is_signed(path))
        if dtype == "bfloat16_stochastic":
            return round_at_random(x, jax.random.fold_in(key, index))
        return x.astype(jnp.bfloat16 if dtype == "bfloat16" else jnp.float32)

    return jax.tree.unflatten(structure, [store(index, *leaf) for index, leaf in enumerate(leaves)])


def _load(path: KeyPath, x: jax.Array | Blocks8) -> jax.Array:
    """Inverts `_store` for one array."""
    if isinstance(x, Blocks8):
        return from_blocks(x, signed=_is_signed(path))
    return x.astype(jnp.float32) if _is_floating(x) else x


def _to_float32(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if _is_floating(x) else x, tree)


def _is_floating(x: jax.Array) -> bool:
    return x.ndim > 0 and jnp.issubdtype(x.dtype, jnp.floating)


def _in_blocks(x: PyTree) -> bool:
    return isinstance(x, Blocks8)


def _has_blocks(x: jax.Array) -> bool:
    """Returns whether 8 bits are worth a scale for each block of this array."""
    return _is_floating(x) and x.size >= MIN_SIZE and _block_size(x) >= MIN_BLOCK


def _is_signed(path: KeyPath) -> bool:
    """Returns whether an array may be negative: not if optax calls it `nu`, a second moment."""
    return not any(isinstance(key, jax.tree_util.GetAttrKey) and key.name.startswith("nu") for key in path)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two nearest bfloat16, to each in proportion to its nearness.

    The expected value is `x`: changes too small for bfloat16 add up over many steps. Does not depend on the mesh.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sharding = jax.typeof(x).sharding
    noise = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=None if sharding.mesh.empty else sharding)
    # Noise in the bits that bfloat16 lacks carries into those that it has; what is left below is then cut off.
    rounded = jax.lax.bitcast_convert_type((bits + noise) & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def to_blocks(x: jax.Array, *, signed: bool) -> Blocks8:
    """Quantizes an array to 8 bits by block; codes without a sign have twice as many values, for numbers >= 0.

    Scales do not depend on the mesh: devices that hold parts of one block agree on them.
    """
    parts = _split(x)
    largest, per_block = jnp.max(jnp.abs(parts), axis=-1), _block_size(x) // parts.shape[-1]
    if per_block > 1:
        unsharded = jax.reshard(largest, PartitionSpec(*_spec(x)[:-1], None))
        largest = jnp.max(unsharded.reshape(*x.shape[:-1], -1, per_block), axis=-1)
    scales = jnp.expand_dims(_scales_of_parts(largest, x), -1)
    codes = encode(parts * (1 / jnp.where(scales == 0, 1, scales)), signed=signed)
    return Blocks8(codes.reshape(x.shape, out_sharding=_out(x, _spec(x))), largest)


def from_blocks(blocks: Blocks8, *, signed: bool) -> jax.Array:
    """Inverts `to_blocks`, up to rounding."""
    codes = blocks.codes
    scales = jnp.expand_dims(_scales_of_parts(blocks.scales, codes), -1)
    return (decode(_split(codes), signed=signed) * scales).reshape(codes.shape, out_sharding=_out(codes, _spec(codes)))


def encode(x: jax.Array, *, signed: bool) -> jax.Array:
    """Returns the code, uint8, of the value that is nearest to each number of [-1, 1]: the smaller of two alike."""
    magnitude = jnp.abs(x)
    decade = jnp.searchsorted(np.array(_bounds(signed)[1:-1]), magnitude, method="compare_all").astype(jnp.int32)
    count = jnp.left_shift(1 if signed else 2, decade)
    index = jnp.ceil((magnitude / _start(decade) - 1) * (count / np.float32(9)) - 1).astype(jnp.int32)
    code = count - (0 if signed else 1) + jnp.clip(index, 0, count - 1)
    smallest, *_, largest = _bounds(signed)
    code = jnp.where(magnitude > smallest, code, 0)
    if not signed:
        return jnp.where(magnitude > largest, 255, code).astype(jnp.uint8)
    return (ZERO + jnp.where(x > largest, ZERO + 1, jnp.where(x < 0, -code, code))).astype(jnp.uint8)


def decode(codes: jax.Array, *, signed: bool) -> jax.Array:
    """Returns the value of each code, float32, within one unit in the last place of the table of bitsandbytes."""
    number = codes.astype(jnp.int32) - (ZERO if signed else 0)
    at = jnp.abs(number) + (0 if signed else 1)  # the first code of a decade is now a power of two
    digits = 31 - jax.lax.clz(at)
    decade, count = digits - (0 if signed else 1), jnp.left_shift(1, digits)
    value = _start(decade) * (1 + 9 * ((at - count).astype(jnp.float32) + 0.5) / count.astype(jnp.float32))
    value = jnp.where(number < 0, -value, value)
    return jnp.where(number == 0, 0, jnp.where(codes == 255, 1, value)).astype(jnp.float32)


def _start(decade: jax.Array) -> jax.Array:
    """Returns the lower end of a decade, from 1e-7 to 0.1: by choices, since lookups in a table are slow on TPUs."""
    start = jnp.full_like(decade, 1e-7, jnp.float32)
    for index in range(1, DECADES):
        start = jnp.where(decade >= index, np.float32(10.0 ** (index - DECADES)), start)
    return start


def _bounds(signed: bool) -> list[np.float32]:
    """Returns the largest magnitude that is nearer to zero than to a value, then that of each decade."""
    counts = [2 ** (decade if signed else decade + 1) for decade in range(DECADES)]
    starts = [10.0 ** (decade - DECADES) for decade in range(DECADES)]
    first = [start * (1 + 4.5 / count) for start, count in zip(starts, counts, strict=True)]
    last = [start * (10 - 4.5 / count) for start, count in zip(starts, counts, strict=True)]
    return [np.float32((low + high) / 2) for low, high in zip([0.0, *last], [*first, 1.0], strict=True)]


def _block_size(x: jax.Array) -> int:
    """Returns how many numbers share a scale: 256, or fewer in a dimension that 256 does not divide."""
    return math.gcd(x.shape[-1], BLOCK)


def _split(x: jax.Array) -> jax.Array:
    """Splits the last dimension into blocks, or into parts of blocks where the mesh divides those."""
    size = math.gcd(local_shape(x)[-1], _block_size(x))
    spec = _spec(x)
    return x.reshape(*x.shape[:-1], -1, size, out_sharding=_out(x, PartitionSpec(*spec, None)))


def _scales_of_parts(scales: jax.Array, x: jax.Array) -> jax.Array:
    """Repeats scales of blocks for the parts of `_split(x)`, with their sharding."""
    num_parts = x.shape[-1] // math.gcd(local_shape(x)[-1], _block_size(x))
    if num_parts == scales.shape[-1]:
        return scales
    repeated = jnp.repeat(scales, num_parts // scales.shape[-1], axis=-1)
    return jax.reshard(repeated, _spec(x))


def _spec(x: jax.Array) -> PartitionSpec:
    """Returns how an array is sharded, with an entry for each dimension."""
    return PartitionSpec(*(axes or None for axes in axes_by_dim(jax.typeof(x).sharding.spec, x.ndim)))


def _out(x: jax.Array, spec: PartitionSpec) -> PartitionSpec | None:
    """Returns `spec`, or None where no mesh is set."""
    return None if jax.typeof(x).sharding.mesh.empty else spec
