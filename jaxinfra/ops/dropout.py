"""Dropout with masks that do not depend on the mesh, the pipeline schedule or the number of microbatches.

`Program` gives every token of a global batch 32 random bits, from the seed, the step, and the token's row and index.
They are a field of the batch. The mask of an activation is a hash of these bits, the layer, the place in the layer
(`site`) and the feature; the backward pass computes it again.

The hash is Threefry 2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), as in `jax.random`. One
call returns 64 bits. A feature needs 16 bits, so one call is enough for four features.

Shape suffixes: B batch, T length, D features. In a pipeline B counts the rows of all S stages.
"""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P

DROPOUT_FIELD = "dropout"
"""The batch field with the random bits of the tokens; without it nothing is dropped."""

EMBEDDING_LAYER = -1
"""The layer index for dropout on embeddings."""

RATE_STEPS = 1 << 16
"""Rates are multiples of `1 / RATE_STEPS`."""


def token_bits(key: jax.Array, step: jax.Array, shape: tuple[int, int], out: P | None = None) -> jax.Array:
    """Draws random bits for each token of the global batch of a step: uint32 `[B, T]`, the same for any sharding."""
    return jax.random.bits(jax.random.fold_in(key, step), shape, jnp.uint32, out_sharding=out)


def layer_bits(token_bits_BT: jax.Array | None, layer: jax.Array | int) -> jax.Array | None:
    """Hashes the bits of the tokens with a layer index; None stays None.

    `layer` is an int32 scalar. In a pipeline of S stages it is `[S]`, and the rows of the batch belong to the stages.
    """
    if token_bits_BT is None:
        return None
    layer = jnp.asarray(layer, jnp.int32)
    if layer.ndim == 0:
        return _hash(token_bits_BT, layer)[0]
    spec = jax.typeof(token_bits_BT).sharding.spec
    hash_of_stage = jax.shard_map(
        lambda bits, layer: _hash(bits, layer[0])[0], in_specs=(spec, P("stage")), out_specs=spec
    )
    return hash_of_stage(token_bits_BT, layer)


def dropout(x_BTD: jax.Array, layer_bits_BT: jax.Array | None, site: int, rate: float) -> jax.Array:
    """Sets features to zero at the given rate and scales the others, to keep the mean.

    Args:
        x_BTD: an activation; D is not sharded.
        layer_bits_BT: from `layer_bits`; None drops nothing.
        site: index of the activation in its layer.
        rate: from 0 to below 1, rounded to a multiple of `1 / RATE_STEPS`.
    """
    if layer_bits_BT is None:
        return x_BTD
    spec = jax.typeof(x_BTD).sharding.spec
    bits = jax.reshard(layer_bits_BT, P(*spec.partitions[:2]))
    features, dropped = x_BTD.shape[-1], min(round(rate * RATE_STEPS), RATE_STEPS - 1)
    calls = -(-features // 4)  # one call of the hash for four features, rounded up
    counters = jnp.arange(calls, dtype=jnp.uint32) + jnp.uint32(site * calls)
    first, second = _hash(bits[..., None], counters)
    low_bits = RATE_STEPS - 1
    uniform = jnp.concatenate([first >> 16, first & low_bits, second >> 16, second & low_bits], axis=-1)
    keep_BTD = uniform[..., :features] >= dropped
    return jnp.where(keep_BTD, x_BTD * (RATE_STEPS / (RATE_STEPS - dropped)), 0)


def _hash(bits: jax.Array, counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hashes pairs of bits and a counter, broadcast against each other, to 64 bits."""
    counters = counters.astype(jnp.uint32)
    both = bits + counters
    zero = both ^ both  # on platforms where JAX lowers the hash to a loop, all operands need the same sharding
    first, second = threefry2x32_p.bind(bits + zero, zero, counters + zero, zero)
    return first, second
