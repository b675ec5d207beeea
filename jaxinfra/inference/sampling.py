"""How a next token is sampled from logits.

Shape suffixes: B rows, D width of the residual stream, V vocabulary, 1 a dimension of size one.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxinfra.errors import ConfigError
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.parallel.sharding import Partitioner


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is sampled, and where a text ends.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: samples from this number of likeliest tokens; 0 is all.
        top_p: samples from the likeliest tokens that together have this probability (Holtzman et al. 2020).
        min_p: samples from tokens with at least this part of the likeliest one's probability (Nguyen et al. 2024).
        seed: seed of the random numbers.
        stop: a text ends before the first of these strings, which may be special tokens.
    """

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"--temperature {self.temperature}: must not be negative; use --temperature 0.8")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}: must not be negative; use --top-k 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1; use --top-p 1 for all tokens")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"--min-p {self.min_p}: must be from 0 to 1; use --min-p 0 for all tokens")
        if "" in self.stop:
            raise ConfigError('--stop "": would end every text at once; leave the option out')


def sample_tokens(
    logits: FactoredLogits,
    key: jax.Array,
    indices_B: ArrayLike,
    steps_B: ArrayLike,
    sampling: SamplingParams,
    partitioner: Partitioner,
) -> jax.Array:
    """Samples one token of each row, int32 `[B, 1]`, the same on all devices; the hidden states are `[B, 1, D]`.

    The random numbers of a row depend on the key, on `indices_B` and on `steps_B`, both int32 `[B]`.
    """
    logits_BV = jax.reshard(jnp.squeeze(logits.materialize(), 1), partitioner.spec("batch", None))

    def sample(logits_BV: jax.Array, indices_B: jax.Array, steps_B: jax.Array, key: jax.Array) -> jax.Array:
        if sampling.temperature == 0:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        filtered_BV = filter_logits(logits_BV / sampling.temperature, sampling)
        fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        keys_B = jax.vmap(jax.random.fold_in)(fold_in(key, steps_B), indices_B)
        return jax.vmap(jax.random.categorical)(keys_B, filtered_BV).astype(jnp.int32)

    rows = partitioner.spec("batch")
    tokens_B = jax.shard_map(sample, in_specs=(P(*rows, None), rows, rows, P()), out_specs=rows)(
        logits_BV, jax.reshard(indices_B, rows), jax.reshard(steps_B, rows), key
    )
    return jax.reshard(tokens_B, P())[:, None]


def filter_logits(logits_BV: jax.Array, limits: SamplingParams) -> jax.Array:
    """Sets the logits of tokens outside the `top_k` (0: all), then the `top_p` and `min_p` likeliest ones to `-inf`."""
    sorted_BV, top_k = jnp.sort(logits_BV, axis=-1, descending=True), limits.top_k
    if 0 < top_k < logits_BV.shape[-1]:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, top_k - 1 : top_k], -jnp.inf, logits_BV)
        sorted_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < top_k, sorted_BV, -jnp.inf)
    if limits.top_p < 1:
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # Keeps a token if all likelier ones together have less than `top_p`: the one that reaches it is kept, too.
        likelier_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        num_kept_B1 = jnp.sum(likelier_BV < limits.top_p, axis=-1, keepdims=True)
        smallest_B1 = jnp.take_along_axis(sorted_BV, num_kept_B1 - 1, axis=-1)
        logits_BV = jnp.where(logits_BV < smallest_B1, -jnp.inf, logits_BV)
    if limits.min_p > 0:
        logits_BV = jnp.where(logits_BV < sorted_BV[:, :1] + math.log(limits.min_p), -jnp.inf, logits_BV)
    return logits_BV
