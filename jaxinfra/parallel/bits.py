"""Sums the bits of arrays on the device that holds them, so that what two devices have computed can be compared.

A flipped bit changes a sum for certain, other differences with a probability of all but 2**-32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.parallel.spec import PyTree

UNSIGNED: dict[int, Any] = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
"""The integers to read bits as, by bytes of an element."""
_ODD = np.uint32(2654435761)  # 2**32 / golden ratio; odd, so that no weight is 0 modulo 2**32


def sum_bits(values: jax.Array) -> jax.Array:
    """Returns the sum of the bits of each value times a weight that depends on its position, modulo 2**32."""
    bits = _bits(values).reshape(-1)
    weights = (2 * jax.lax.iota(jnp.uint32, bits.size) + 1) * _ODD
    return jnp.sum(bits * weights, dtype=jnp.uint32)


def sum_bits_of_shards(values: jax.Array) -> jax.Array:
    """Returns `sum_bits` of an array that may be sharded, whatever its sharding."""
    bits, spec = _bits(values), jax.typeof(values).sharding.spec
    position = jnp.zeros(values.shape, jnp.uint32, out_sharding=spec)
    for dim, stride in enumerate(np.cumprod([1, *values.shape[:0:-1]])[::-1]):
        index = jax.lax.broadcasted_iota(jnp.uint32, values.shape, dim, out_sharding=spec)
        position += index * np.uint32(int(stride) % 2**32)
    return jnp.sum(bits * (2 * position + 1) * _ODD, dtype=jnp.uint32)


def digest(tree: PyTree) -> jax.Array:
    """Returns the sum of the bits of all arrays, each times a weight of its own, modulo 2**32: uint32[1]."""
    return sum_bits(jnp.stack([sum_bits(leaf) for leaf in jax.tree.leaves(tree)]))[None]


def _bits(values: jax.Array) -> jax.Array:
    values = values.astype(jnp.uint8) if values.dtype == jnp.bool_ else values
    return jax.lax.bitcast_convert_type(values, UNSIGNED[values.dtype.itemsize]).astype(jnp.uint32)
