"""Multi-head attention with grouped keys, rotary positions, query and key norms, and a cache for decoding.

Shape suffixes: B batch, T queries, S cached keys, D residual width, H heads, G key/value heads, K head dim, V head dim
of values (K here, but not in `models.latent`), L layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveFloat, PositiveInt
from jaxinfra.models.layers import SEQUENCE, HeadsNorm, Linear, Norm, ParamFactory
from jaxinfra.models.mixer import HeadSizes, Mixer, MixerOptions, TokenInfo, rope_problems
from jaxinfra.models.remat import name_tensor
from jaxinfra.ops.attention import AttentionSpec, dot_product_attention
from jaxinfra.ops.context_attention import context_parallel_attention
from jaxinfra.ops.norm import rms_norm
from jaxinfra.ops.rope import Rope, rotate
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import constant


class KVCache(NamedTuple):
    """Keys and values of earlier tokens: `[B, G, S, K]` for one layer, `[L, B, G, S, K]` for all."""

    keys: jax.Array
    values: jax.Array


@dataclass(frozen=True, kw_only=True)
class AttentionTemperature:
    """Multiplies the queries at position p by `1 + scale * ln(1 + (p + 1) // floor)` (Llama 4).

    Attributes:
        scale: weight of the logarithm.
        floor: number of positions with the same factor.
    """

    scale: float = 0.1
    floor: PositiveInt = 8192


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """Multi-head attention, in which groups of query heads may share keys and values.

    Attributes:
        num_heads: query heads.
        num_kv_heads: key/value heads; None is `num_heads`.
        head_dim: width of a head; None is `hidden_size / num_heads`.
        rope: rotary positions; None has none.
        window: positions that a query attends to, its own included; None is all before.
        chunk: a query attends only to keys in its own chunk of this many positions of a document (Llama 4).
        softcap: soft cap on attention scores.
        query_scale: factor on queries; None is `head_dim ** -0.5`.
        temperature: another factor on queries, which grows with the position.
        sinks: a learned score for each head, which takes part in the softmax without a value (GPT-OSS).
        share_kv: values are keys before their norm and rotation, without a projection of their own (Gemma 4).
        value_norm: RMSNorm without weights on each value head (Gemma 4).
        qkv_bias: biases on queries, keys and values.
        out_bias: a bias on the output.
        gate: multiplies the output of each head by the sigmoid of another projection of the tokens (Qwen3-Next).
        qk_norm: RMSNorm on each query and key "head" (Qwen3, Gemma 3), on "all" heads at once (OLMo 2), or "l2" on each
            head without weights (Llama 4).
    """

    num_heads: PositiveInt
    num_kv_heads: PositiveInt | None = None
    head_dim: PositiveInt | None = None
    rope: Rope | None = Rope()
    window: PositiveInt | None = None
    chunk: PositiveInt | None = None
    softcap: PositiveFloat | None = None
    query_scale: float | None = None
    temperature: AttentionTemperature | None = None
    sinks: bool = False
    share_kv: bool = False
    value_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    gate: bool = False
    qk_norm: Literal["head", "all", "l2"] | None = None

    @property
    def kv_head_count(self) -> int:
        """Number of key/value heads, also if `num_kv_heads` is None."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_width(self, hidden_size: int) -> int:
        """Returns the width of a head, also if `head_dim` is None."""
        return hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    def problems(self) -> Iterable[Problem]:
        """Yields a number of key/value heads that does not divide the query heads, and a window in a chunk."""
        if self.window is not None and self.chunk is not None:
            yield Problem(fields=("window", "chunk"), message="a layer has one of them", fix="use window=none")
        if self.num_heads % self.kv_head_count:
            divisors = [n for n in range(1, self.kv_head_count + 1) if self.num_heads % n == 0]
            fix = f"use num_kv_heads={max(divisors)}"
            yield Problem(fields=("num_heads", "num_kv_heads"), message="num_kv_heads must divide num_heads", fix=fix)

    @override
    def problems_in_model(self, hidden_size: int, prefix: str) -> Iterable[Problem]:
        if self.head_dim is None and hidden_size % self.num_heads:
            even_heads = 2 * self.num_heads  # a head of even width, since rotary positions pair features
            rounded_up = math.ceil(hidden_size / even_heads) * even_heads
            fix = f"use hidden_size={rounded_up} or set {prefix}head_dim"
            fields = ("hidden_size", f"{prefix}num_heads")
            yield Problem(fields=fields, message="num_heads must divide hidden_size", fix=fix)
        yield from rope_problems(self.rope, self.head_width(hidden_size), prefix, "head_dim")

    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {"num_heads": (self.num_heads, "heads"), "num_kv_heads": (self.kv_head_count, "kv_heads")}

    @override
    def matmul_params(self, hidden_size: int) -> int:
        # Queries, output and its gate have all heads, keys and values only `kv_head_count`.
        heads = (3 if self.gate else 2) * self.num_heads + (1 if self.share_kv else 2) * self.kv_head_count
        return hidden_size * self.head_width(hidden_size) * heads

    @override
    def rotary(self, hidden_size: int) -> tuple[Rope, int] | None:
        return None if self.rope is None else (self.rope, self.head_width(hidden_size))

    @override
    def attention(self, hidden_size: int) -> tuple[AttentionSpec, HeadSizes]:
        head_dim, scale = self.head_width(hidden_size), self.query_scale
        if self.rope is not None and self.rope.score_scale != 1:
            scale = self.rope.score_scale * (head_dim**-0.5 if scale is None else scale)
        spec = AttentionSpec(window=self.window, softcap=self.softcap, scale=scale)
        return spec, HeadSizes(self.num_heads, self.kv_head_count, head_dim, head_dim)

    @override
    def visible_keys(self, hidden_size: int, length: int) -> float:
        if self.chunk is None:
            return super().visible_keys(hidden_size, length)
        # The queries of a whole chunk attend to 1, 2, ..., `chunk` keys; the last chunk may have only `rest` positions.
        rest = length % self.chunk
        return ((length - rest) * (self.chunk + 1) / 2 + rest * (rest + 1) / 2) / length

    @override
    def build(self, options: MixerOptions, params: ParamFactory) -> "AttentionModule":
        return AttentionModule(self, options, params)


class AttentionModule(nnx.Module):
    """Attention over a sequence, or over a cache and the tokens that follow it."""

    def __init__(self, config: Attention, options: MixerOptions, params: ParamFactory):
        self.config, self.options, self.partitioner = config, options, params.partitioner
        hidden = (options.hidden_size,)
        spec, (num_heads, num_kv_heads, head_dim, _) = config.attention(options.hidden_size)
        self.spec = replace(spec, causal=options.causal)
        linear = partial(Linear, params=params)
        project = partial(linear, hidden, parallelism="column", bias=config.qkv_bias)
        self.query = project((num_heads, head_dim), ("embed", "heads", None))
        self.gate = project((num_heads, head_dim), ("embed", "heads", None)) if config.gate else None
        self.key = project((num_kv_heads, head_dim), ("embed", "kv_heads", None))
        self.value = None if config.share_kv else project((num_kv_heads, head_dim), ("embed", "kv_heads", None))
        out = partial(linear, (num_heads, head_dim), hidden, ("heads", None, "embed"), parallelism="row")
        self.out = out(bias=config.out_bias, scale=options.out_scale, tensor="out_proj")
        self.sinks = params.param((num_heads,), ("heads",), constant(0.0), "bias") if config.sinks else None

        def qk_norm(heads: int, axis: str) -> Norm | HeadsNorm | None:
            norm_config = replace(options.norm, type="rmsnorm")
            if config.qk_norm == "all":
                return HeadsNorm(heads, head_dim, axis, norm_config, params=params)
            # "l2" has no weights, so it has no module.
            return Norm(head_dim, norm_config, params=params) if config.qk_norm == "head" else None

        self.query_norm, self.key_norm = qk_norm(num_heads, "heads"), qk_norm(num_kv_heads, "kv_heads")

    def __call__(self, x_BTD: jax.Array, tokens: TokenInfo, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        """Returns the output, sharded like the residual stream `x_BTD`, and the cache with these tokens added."""
        x_BTD = self.partitioner.gather_sequence(x_BTD, "heads")
        q_BTHK, k_BTGK = self.query(x_BTD), self.key(x_BTD)
        v_BTGK = k_BTGK if self.value is None else self.value(x_BTD)
        normalize = partial(rms_norm, eps=self.options.norm.eps)
        if self.config.value_norm:
            v_BTGK = self.partitioner.map_local(normalize, v_BTGK)
        if isinstance(self.query_norm, Norm) and isinstance(self.key_norm, Norm):
            q_BTHK = self.query_norm(q_BTHK, (*SEQUENCE, "heads"))
            k_BTGK = self.key_norm(k_BTGK, (*SEQUENCE, "kv_heads"))
        elif isinstance(self.query_norm, HeadsNorm) and isinstance(self.key_norm, HeadsNorm):
            q_BTHK, k_BTGK = self.query_norm(q_BTHK), self.key_norm(k_BTGK)
        elif self.config.qk_norm == "l2":
            q_BTHK, k_BTGK = (self.partitioner.map_local(normalize, x) for x in (q_BTHK, k_BTGK))
        if tokens.rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *tokens.rope), rotate(k_BTGK, *tokens.rope)
        if self.config.temperature is not None:
            assert tokens.positions is not None
            q_BTHK *= _temperature(self.config.temperature, tokens.positions).astype(q_BTHK.dtype)
        q_BTHK, k_BTGK = name_tensor(q_BTHK, "query"), name_tensor(k_BTGK, "key")
        v_BTGK = name_tensor(v_BTGK, "value")
        if cache is None:
            segments_BT = self._segments(tokens, *x_BTD.shape[:2])
            y_BTHK = self_attention(
                q_BTHK, k_BTGK, v_BTGK, self.spec, segments_BT, self.options, self.partitioner, self._sinks()
            )
            return self.out(self._gated(y_BTHK, x_BTD)), None
        start, chunk = tokens.start, self.config.chunk
        assert start is not None
        new = (jnp.swapaxes(each, 1, 2) for each in (k_BTGK, v_BTGK))
        cache = KVCache(*(update_cache(*each, start, dim=2) for each in zip(cache, new, strict=True)))
        keys, values = (jnp.swapaxes(each, 1, 2) for each in cache)
        positions = cached_positions(start, q_BTHK, keys)
        # A row of a cache is one document, so its chunks are its only segments.
        segments = None if chunk is None else (positions[0] // chunk, positions[1] // chunk)
        attend = partial(dot_product_attention, platform=self.partitioner.platform, sinks_H=self._sinks())
        y_BTHK = attend(q_BTHK, keys, values, self.spec, segments=segments, positions=positions)
        return self.out(self._gated(y_BTHK, x_BTD)), cache

    def _gated(self, y_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """Multiplies the output of each head by its gate, if there is one."""
        return y_BTHK if self.gate is None else y_BTHK * jax.nn.sigmoid(self.gate(x_BTD))

    def _sinks(self) -> jax.Array | None:
        """Returns the sinks `[H]`, sharded like the heads; None without sinks."""
        if self.sinks is None:
            return None
        return self.partitioner.gather_weight(self.sinks[...], ("heads",), dtype=jnp.dtype("float32"))

    def _segments(self, tokens: TokenInfo, rows: int, length: int) -> jax.Array | None:
        """Returns an id for each document, or with `chunk` for each chunk of a document, `[B, T]`."""
        if self.config.chunk is None:
            return tokens.segments
        assert tokens.positions is not None
        chunks_BT = tokens.positions // self.config.chunk
        if tokens.segments is None:
            spec = self.partitioner.spec("batch", "sequence")
            return jax.reshard(jnp.broadcast_to(chunks_BT, (rows, length)), spec)
        max_chunks = length // self.config.chunk + 1  # of a document, so that no two chunks of a row have the same id
        return tokens.segments * max_chunks + chunks_BT

    def empty_cache(self, num_layers: int, batch: int, length: int) -> KVCache:
        """Returns a cache of all layers for `length` tokens of `batch` rows."""
        _, (_, num_kv_heads, head_dim, _) = self.config.attention(self.options.hidden_size)
        shape = (num_layers, batch, num_kv_heads, length, head_dim)
        spec = self.partitioner.spec(None, "batch", "kv_heads", None, None)
        zeros = jnp.zeros(shape, self.partitioner.compute_dtype, out_sharding=spec)
        return KVCache(zeros, jnp.zeros_like(zeros))


def _temperature(temperature: AttentionTemperature, positions_BT: jax.Array) -> jax.Array:
    """Returns the factor on the queries, float32 `[B or 1, T, 1, 1]`."""
    steps_BT = jnp.floor((positions_BT + 1).astype(jnp.float32) / temperature.floor)
    return (1 + temperature.scale * jnp.log1p(steps_BT))[..., None, None]


def self_attention(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGV: jax.Array,
    spec: AttentionSpec,
    segments_BT: jax.Array | None,
    options: MixerOptions,
    partitioner: Partitioner,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Computes attention without a cache, `[B, T, H, V]`; V is the head dim of the values, T may be sharded."""
    sharding, platform, kernel = partitioner.sequence_sharding, partitioner.platform, options.kernel
    if sharding.num_shards > 1 or sinks_H is not None:  # it also knows how to add sinks to any kernel
        return context_parallel_attention(
            q_BTHK,
            k_BTGK,
            v_BTGV,
            spec,
            sharding=sharding,
            platform=platform,
            ids_BT=segments_BT,
            kernel=kernel,
            method=options.context_method,
            sinks_H=sinks_H,
        )
    segments = None if segments_BT is None else (segments_BT, segments_BT)  # of queries and of keys
    return dot_product_attention(q_BTHK, k_BTGK, v_BTGV, spec, platform=platform, segments=segments, kernel=kernel)


def update_cache(cache: jax.Array, new: jax.Array, start_B: jax.Array, dim: int = 1) -> jax.Array:
    """Returns the cache `[B, S, ...]` with new tokens `[B, T, ...]` from the slot `start_B` of each row on.

    `dim` is the dimension of slots and tokens in both.
    """
    arrays = (cache, new.astype(cache.dtype), start_B)
    specs = tuple(jax.typeof(a).sharding.spec for a in arrays)

    def on_device(cache: jax.Array, new: jax.Array, start_B: jax.Array) -> jax.Array:
        return jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=dim - 1))(cache, new, start_B)

    return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0])(*arrays)


def cached_positions(start_B: jax.Array, queries: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the positions of queries `[B, T, ...]` that begin at slots `start_B`, and of a cache `[B, S, ...]`.

    Two queries at `start_B=[3, 0]` and a cache of 8 slots give `[[3, 4], [0, 1]]` and `[[0, ..., 7]]`. Later slots are
    masked, since attention is causal.
    """
    return start_B[:, None] + jnp.arange(queries.shape[1])[None], jnp.arange(cache.shape[1])[None]
