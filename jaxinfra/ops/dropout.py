"""Dropout whose mask belongs to the token, not to the place and time of its computation.

`Program` gives every token of a global batch a random word, from the seed, the step, and the token's row and index.
The word travels with the token as a field of the batch: through microbatches, stages of a pipeline and shards of a
sequence. What is dropped of an activation is a hash of that word, the layer, the site and the feature. So a mesh, a
schedule or a number of microbatches changes no mask, and the backward pass hashes again what it does not keep.

The hash is Threefry 2x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), the same that
`jax.random` has. One call makes 64 bits; a feature takes 16 of them, so a call serves four features.

Shape suffixes: B batch, T length, D features.
"""

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p
from jax.sharding import PartitionSpec as P

FIELD = "dropout"
"""The field of a batch with the words of its tokens; a batch without it drops nothing."""

BEFORE_LAYERS = -1
"""What stands for the number of a layer before the first."""

STEPS = 1 << 16
"""Rates are multiples of one part in so many."""


def token_words(key: jax.Array, step: jax.Array, shape: tuple[int, int], out: P | None = None) -> jax.Array:
    """A random word for each token of the global batch of a step: uint32 `[B, T]`, the same for any sharding."""
    return jax.random.bits(jax.random.fold_in(key, step), shape, jnp.uint32, out_sharding=out)


def layer_words(words_BT: jax.Array | None, number: jax.Array | int) -> jax.Array | None:
    """The words of the tokens in one layer; None where there are none.

    Args:
        words_BT: of the tokens, uint32.
        number: of the layer, an int32 scalar; in a pipeline `[S]`, where the rows are those of S stages.
    """
    if words_BT is None:
        return None
    number = jnp.asarray(number, jnp.int32)
    if number.ndim == 0:
        return _hash(words_BT, number)[0]
    spec = jax.typeof(words_BT).sharding.spec
    own = jax.shard_map(lambda words, number: _hash(words, number[0])[0], in_specs=(spec, P("stage")), out_specs=spec)
    return own(words_BT, number)


def drop(x_BTD: jax.Array, words_BT: jax.Array | None, site: int, rate: float) -> jax.Array:
    """`x_BTD` with features zero at the given rate, and the others larger, so that the mean stays.

    Args:
        x_BTD: an activation, features whole.
        words_BT: of its tokens, in this layer; moved to the sharding of `x_BTD`. None drops nothing.
        site: which of the activations of a layer it is.
        rate: from 0 to below 1, rounded to a multiple of `1 / STEPS`.
    """
    if words_BT is None:
        return x_BTD
    spec = jax.typeof(x_BTD).sharding.spec
    words = jax.reshard(words_BT, P(*spec.partitions[:2]))
    width, dropped = x_BTD.shape[-1], min(round(rate * STEPS), STEPS - 1)
    quarter = -(-width // 4)
    counters = jnp.arange(quarter, dtype=jnp.uint32) + jnp.uint32(site * quarter)
    halves = [part for word in _hash(words[..., None], counters) for part in (word >> 16, word & (STEPS - 1))]
    kept_BTD = jnp.concatenate(halves, axis=-1)[..., :width] >= dropped
    return jnp.where(kept_BTD, x_BTD * (STEPS / (STEPS - dropped)), 0)


def _hash(words: jax.Array, counters: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two words for each pair of a word and a counter, broadcast against each other."""
    counters = counters.astype(jnp.uint32)
    both = words + counters
    zero = both ^ both  # sharded like the sum: where JAX writes the hash as a loop, all four must be alike
    first, second = threefry2x32_p.bind(words + zero, zero, counters + zero, zero)
    return first, second
