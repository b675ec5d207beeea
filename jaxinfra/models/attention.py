"""Multi-head attention with grouped keys, rotary positions, query and key norms, and a cache for decoding.

Shape suffixes: B batch, T queries, S cached keys, D residual width, H heads, G key/value heads, K head width.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.models.layers import Linear, Norm, Stack
from jaxinfra.ops.attention import AttentionSpec, Kernel, dot_product_attention
from jaxinfra.ops.context_attention import context_parallel_attention
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.rope import rotate
from jaxinfra.parallel.sharding import Partitioner


class KV(NamedTuple):
    """Keys and values of earlier tokens: of one layer `[B, S, G, K]`, of all `[L, B, S, G, K]`."""

    keys: jax.Array
    values: jax.Array


class Place(NamedTuple):
    """Where the tokens of a call stand.

    Attributes:
        tables: rotary cosines and sines `[B or 1, T, 1, rotated / 2]`; None without rotary positions.
        segments: document ids `[B, T]`; None if rows are whole documents.
        start: the cache slot of the first token, an int32 scalar; None without a cache.
    """

    tables: tuple[jax.Array, jax.Array] | None
    segments: jax.Array | None
    start: jax.Array | None


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The sizes and options of one attention layer (see `TransformerConfig`)."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool = False
    norm_eps: float
    norm_offset: float = 0.0
    out_scale: float
    kernel: Kernel | None
    method: ContextMethod | Literal["auto"] = "auto"


class Attention(nnx.Module):
    """Attention over a sequence, or over a cache and the tokens that follow it."""

    def __init__(self, shape: AttentionShape, stack: Stack):
        self.kernel: Kernel | None = shape.kernel
        self.method: ContextMethod | Literal["auto"] = shape.method
        self.partitioner = stack.partitioner
        width, query, key = (shape.width,), (shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim)
        linear = partial(Linear, stack=stack)
        project = partial(linear, width, direction="inward", bias=shape.qkv_bias)
        self.query = project(query, ("embed", "heads", None))
        self.key = project(key, ("embed", "kv_heads", None))
        self.value = project(key, ("embed", "kv_heads", None))
        self.out = linear(
            query, width, ("heads", None, "embed"), direction="outward", bias=shape.out_bias, scale=shape.out_scale
        )
        norm = partial(Norm, kind="rmsnorm", eps=shape.norm_eps, offset=shape.norm_offset, stack=stack)
        self.query_norm = norm(shape.head_dim) if shape.qk_norm else None
        self.key_norm = norm(shape.head_dim) if shape.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, spec: AttentionSpec, place: Place, cache: KV | None
    ) -> tuple[jax.Array, KV | None]:
        """`[B, T, D]` with block positions to the same, and the cache with these tokens."""
        x_BTD = self.partitioner.gather_sequence(x_BTD, "heads")
        q_BTHK, k_BTGK, v_BTGK = self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK = self.query_norm(q_BTHK, ("batch", "sequence", "heads"))
            k_BTGK = self.key_norm(k_BTGK, ("batch", "sequence", "kv_heads"))
        if place.tables is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *place.tables), rotate(k_BTGK, *place.tables)
        if cache is None:
            y_BTHK = among_themselves(
                q_BTHK,
                k_BTGK,
                v_BTGK,
                spec,
                place.segments,
                partitioner=self.partitioner,
                kernel=self.kernel,
                method=self.method,
            )
            return self.out(y_BTHK), None
        assert place.start is not None
        cache = KV(*(write(a, new, place.start) for a, new in zip(cache, (k_BTGK, v_BTGK), strict=True)))
        positions = (place.start + jnp.arange(x_BTD.shape[1])[None], jnp.arange(cache.keys.shape[1])[None])
        y_BTHK = dot_product_attention(q_BTHK, *cache, spec, platform=self.partitioner.platform, positions=positions)
        return self.out(y_BTHK), cache

    def empty_cache(self, layers: int, batch: int, length: int) -> KV:
        """A cache for `length` tokens of `batch` rows, of all layers."""
        shape, partitioner = self.key.weight[...].shape[-2:], self.partitioner
        spec = partitioner.spec(None, "batch", None, "kv_heads", None)
        zeros = jnp.zeros((layers, batch, length, *shape), partitioner.compute_dtype, out_sharding=spec)
        return KV(zeros, jnp.zeros_like(zeros))


def among_themselves(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    spec: AttentionSpec,
    segments_BT: jax.Array | None,
    *,
    partitioner: Partitioner,
    kernel: Kernel | None,
    method: ContextMethod | Literal["auto"],
) -> jax.Array:
    """Computes self-attention over whole sequences, `[B, T, H, V]`, whether or not they are sharded."""
    sharding, platform = partitioner.sequence_sharding, partitioner.platform
    if sharding.num_shards > 1:
        across = partial(context_parallel_attention, sharding=sharding, platform=platform, kernel=kernel, method=method)
        return across(q_BTHK, k_BTGK, v_BTGV, spec, ids_BT=segments_BT)
    segments = None if segments_BT is None else (segments_BT, segments_BT)
    return dot_product_attention(q_BTHK, k_BTGK, v_BTGV, spec, platform=platform, segments=segments, kernel=kernel)


def write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """The cache `[B, S, ...]` with these tokens `[B, T, ...]` from slot `start` on."""
    return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), start, axis=1)
