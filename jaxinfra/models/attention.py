"""Multi-head attention with grouped keys, rotary positions, query and key norms, and a cache for decoding.

Shape suffixes: B batch, T queries, S cached keys, D residual width, H heads, G key/value heads, K head dim.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.models.layers import SEQUENCE, Linear, Norm, ParamFactory
from jaxinfra.ops.attention import AttentionSpec, Kernel, dot_product_attention
from jaxinfra.ops.context_attention import context_parallel_attention
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.rope import rotate
from jaxinfra.parallel.sharding import Partitioner


class KVCache(NamedTuple):
    """Keys and values of earlier tokens: `[B, S, G, K]` for one layer, `[L, B, S, G, K]` for all."""

    keys: jax.Array
    values: jax.Array


class TokenInfo(NamedTuple):
    """Positions and documents of the tokens that a layer processes.

    Attributes:
        rope: cosines and sines of the positions, `[B or 1, T, 1, rotated / 2]`; None without rotary positions.
        segments: document ids `[B, T]`; None if every row is one document.
        start: the cache slot of the first token, an int32 scalar; None without a cache.
        dropout_bits: random bits `[B, T]` (see `ops.dropout`); None drops nothing.
    """

    rope: tuple[jax.Array, jax.Array] | None = None
    segments: jax.Array | None = None
    start: jax.Array | None = None
    dropout_bits: jax.Array | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """The sizes and options of one attention layer, as in `TransformerConfig`.

    `out_scale` is a factor on the initial weights of the output projection.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool = False
    norm_eps: float
    norm_offset: float = 0.0
    out_scale: float
    kernel: Kernel | None
    context_method: ContextMethod | Literal["auto"] = "auto"


class Attention(nnx.Module):
    """Attention over a sequence, or over a cache and the tokens that follow it."""

    def __init__(self, config: AttentionConfig, params: ParamFactory):
        self.config, self.partitioner = config, params.partitioner
        hidden, head_dim = (config.hidden_size,), config.head_dim
        linear = partial(Linear, params=params)
        project = partial(linear, hidden, parallelism="column", bias=config.qkv_bias)
        self.query = project((config.num_heads, head_dim), ("embed", "heads", None))
        self.key = project((config.num_kv_heads, head_dim), ("embed", "kv_heads", None))
        self.value = project((config.num_kv_heads, head_dim), ("embed", "kv_heads", None))
        self.out = linear(
            (config.num_heads, head_dim),
            hidden,
            ("heads", None, "embed"),
            parallelism="row",
            bias=config.out_bias,
            scale=config.out_scale,
        )
        norm = partial(Norm, head_dim, norm_type="rmsnorm", eps=config.norm_eps, offset=config.norm_offset)
        self.query_norm = norm(params=params) if config.qk_norm else None
        self.key_norm = norm(params=params) if config.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, spec: AttentionSpec, tokens: TokenInfo, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the output, sharded like the residual stream `x_BTD`, and the cache with these tokens added."""
        x_BTD = self.partitioner.gather_sequence(x_BTD, "heads")
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK = self.query_norm(q_BTHK, (*SEQUENCE, "heads"))
            k_BTGK = self.key_norm(k_BTGK, (*SEQUENCE, "kv_heads"))
        if tokens.rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *tokens.rope), rotate(k_BTGK, *tokens.rope)
        if cache is None:
            y_BTHK = self_attention(q_BTHK, k_BTGK, v_BTGK, spec, tokens.segments, self.config, self.partitioner)
            return self.out(y_BTHK), None
        start = tokens.start
        assert start is not None
        cache = KVCache(update_cache(cache.keys, k_BTGK, start), update_cache(cache.values, v_BTGK, start))
        positions = cached_positions(start, q_BTHK, cache.keys)
        y_BTHK = dot_product_attention(q_BTHK, *cache, spec, platform=self.partitioner.platform, positions=positions)
        return self.out(y_BTHK), cache

    def empty_cache(self, num_layers: int, batch: int, length: int) -> KVCache:
        """Returns a cache of all layers for `length` tokens of `batch` rows."""
        shape = (num_layers, batch, length, self.config.num_kv_heads, self.config.head_dim)
        spec = self.partitioner.spec(None, "batch", None, "kv_heads", None)
        zeros = jnp.zeros(shape, self.partitioner.compute_dtype, out_sharding=spec)
        return KVCache(zeros, jnp.zeros_like(zeros))


def self_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    spec: AttentionSpec,
    segments_BT: jax.Array | None,
    config: AttentionConfig,
    partitioner: Partitioner,
) -> jax.Array:
    """Computes attention without a cache, `[B, T, H, V]`; V is the head dim of the values, T may be sharded."""
    sharding, platform, kernel = partitioner.sequence_sharding, partitioner.platform, config.kernel
    if sharding.num_shards > 1:
        return context_parallel_attention(
            q_BTHK,
            k_BTGK,
            v_BTGV,
            spec,
            sharding=sharding,
            platform=platform,
            ids_BT=segments_BT,
            kernel=kernel,
            method=config.context_method,
        )
    segments = None if segments_BT is None else (segments_BT, segments_BT)  # of queries and of keys
    return dot_product_attention(q_BTHK, k_BTGK, v_BTGV, spec, platform=platform, segments=segments, kernel=kernel)


def update_cache(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Returns the cache `[B, S, ...]` with new tokens `[B, T, ...]` from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=1)


def cached_positions(start: jax.Array, queries: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of queries `[B, T, ...]` that begin at slot `start`, and of a cache `[B, S, ...]`.

    Two queries at `start=3` and a cache of 8 slots give `[[3, 4]]` and `[[0, ..., 7]]`. Later slots are masked, since
    attention is causal.
    """
    return start + jnp.arange(queries.shape[1])[None], jnp.arange(cache.shape[1])[None]
