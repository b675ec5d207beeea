"""Multi-head latent attention (MLA; DeepSeek-AI 2024, "DeepSeek-V2", section 2.1): keys and values from a small latent.

A token is projected down to a latent, and the latent up to the keys and values of all heads. Queries may have their own
latent. Rotary positions use separate features: a part of each query head, and one key that all heads share.

Training computes keys and values in full and uses normal attention. Decoding caches only the latent and the rotated
key. For keys `k = c W` of a latent c, the score `q k` is `(q W) c`: the up-projection is applied to the queries, and in
the same way that of values to the output. All heads then attend to one key and value per token, the latent itself.

With sequence parallelism the latents are all-gathered over positions, as they are narrower than the residual stream.

Shape suffixes: B batch, T queries, S cached tokens, D residual width, H heads, K head dim of queries and keys (N
features without positions, P rotated features), V head dim of values, R latent rank, L layers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, override

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveFloat, PositiveInt
from jaxinfra.models.attention import cached_positions, self_attention, update_cache
from jaxinfra.models.layers import RESIDUAL, Linear, Norm, ParamFactory
from jaxinfra.models.mixer import HeadSizes, Mixer, MixerOptions, TokenInfo, rope_problems
from jaxinfra.models.remat import name_tensor
from jaxinfra.ops.attention import AttentionSpec, dot_product_attention
from jaxinfra.ops.rope import Rope, rotate


@dataclass(frozen=True, kw_only=True)
class LatentAttention(Mixer):
    """Multi-head latent attention, with sizes named as in published configs; defaults are DeepSeek-V2-Lite's.

    Attributes:
        num_heads: heads.
        kv_lora_rank: width of the latent of keys and values.
        q_lora_rank: width of the latent of queries; None projects queries from the residual stream.
        qk_nope_head_dim: features of a query or key head without positions.
        qk_rope_head_dim: rotated features of a query head, and of the key that all heads share.
        v_head_dim: features of a value head.
        rope: rotary positions.
        window: positions that a query attends to, its own included; None is all before.
        softcap: soft cap on attention scores.
        query_scale: factor on queries; None is one over the square root of the width of a query.
        norm_eps: added to the variance of latents; None is that of the model's norms.
    """

    num_heads: PositiveInt
    kv_lora_rank: PositiveInt = 512
    q_lora_rank: PositiveInt | None = None
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    rope: Rope = Rope()
    window: PositiveInt | None = None
    softcap: PositiveFloat | None = None
    query_scale: float | None = None
    norm_eps: PositiveFloat | None = None

    @property
    def qk_head_dim(self) -> int:
        """Width of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @override
    def problems_in_model(self, hidden_size: int, prefix: str) -> Iterable[Problem]:
        return rope_problems(self.rope, self.qk_rope_head_dim, prefix, "qk_rope_head_dim")

    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        dims = {"kv_lora_rank": (self.kv_lora_rank, "embed"), "num_heads": (self.num_heads, "heads")}
        return dims if self.q_lora_rank is None else dims | {"q_lora_rank": (self.q_lora_rank, "embed")}

    @override
    def matmul_params(self, hidden_size: int) -> int:
        heads, q_rank, kv_rank = self.num_heads, self.q_lora_rank, self.kv_lora_rank
        all_queries = heads * self.qk_head_dim
        query = hidden_size * all_queries if q_rank is None else q_rank * (hidden_size + all_queries)
        key_value = kv_rank * (hidden_size + heads * (self.qk_nope_head_dim + self.v_head_dim))
        rotated_key = hidden_size * self.qk_rope_head_dim
        return query + key_value + rotated_key + heads * self.v_head_dim * hidden_size

    @override
    def rotary(self, hidden_size: int) -> tuple[Rope, int]:
        return self.rope, self.qk_rope_head_dim

    @override
    def attention(self, hidden_size: int) -> tuple[AttentionSpec, HeadSizes]:
        # None would scale by the width of the queries, but in a decoding step these are wider than a head.
        scale = self.qk_head_dim**-0.5 if self.query_scale is None else self.query_scale
        spec = AttentionSpec(window=self.window, softcap=self.softcap, scale=self.rope.score_scale * scale)
        return spec, HeadSizes(self.num_heads, self.num_heads, self.qk_head_dim, self.v_head_dim)

    @override
    def build(self, options: MixerOptions, params: ParamFactory) -> "LatentAttentionModule":
        return LatentAttentionModule(self, options, params)


class LatentCache(NamedTuple):
    """Rotated key and latent of earlier tokens: `[B, S, P + R]` for one layer, `[L, B, S, P + R]` for all."""

    tokens: jax.Array


class LatentAttentionModule(nnx.Module):
    """Latent attention over a sequence, or over a cache and the tokens that follow it."""

    def __init__(self, config: LatentAttention, options: MixerOptions, params: ParamFactory):
        self.config, self.options, self.partitioner = config, options, params.partitioner
        self.spec, _ = config.attention(options.hidden_size)
        hidden, heads = options.hidden_size, config.num_heads
        linear = partial(Linear, bias=False, params=params)
        down = partial(linear, (hidden,), axes=("embed", None), parallelism="sequence")
        eps = options.norm.eps if config.norm_eps is None else config.norm_eps
        norm = partial(Norm, config=replace(options.norm, type="rmsnorm", eps=eps), params=params)

        def up(rank: int, head_dim: int) -> Linear:
            # The stored rank is sharded like "embed"; in use only the heads are sharded. The output is not saved, since
            # recomputing it from the latent is cheaper (DeepSeek-AI 2024, "DeepSeek-V3", section 3.2.3).
            axes = ("embed", "heads", None)
            return linear((rank,), (heads, head_dim), axes, parallelism="column", save_output=False)

        self.query_down = down((config.q_lora_rank,)) if config.q_lora_rank else None
        self.query_norm = norm(config.q_lora_rank) if config.q_lora_rank else None
        self.query = up(config.q_lora_rank or hidden, config.qk_head_dim)
        self.kv_down = down((config.kv_lora_rank,))
        self.kv_norm = norm(config.kv_lora_rank)
        self.rotated_key = down((config.qk_rope_head_dim,))
        self.key = up(config.kv_lora_rank, config.qk_nope_head_dim)
        self.value = up(config.kv_lora_rank, config.v_head_dim)
        out_axes = ("heads", None, "embed")
        out = partial(linear, (heads, config.v_head_dim), (hidden,), out_axes, parallelism="row", tensor="out_proj")
        self.out = out(scale=options.out_scale)

    def __call__(
        self, x_BTD: jax.Array, tokens: TokenInfo, cache: LatentCache | None
    ) -> tuple[jax.Array, LatentCache | None]:
        """Returns the output, sharded like the residual stream `x_BTD`, and the cache with these tokens added."""
        assert tokens.rope is not None
        latent_BTR = self.partitioner.gather_sequence(self.kv_norm(self.kv_down(x_BTD), RESIDUAL), "heads")
        rotated_BTP = self.partitioner.gather_sequence(self.rotated_key(x_BTD), "heads")
        q_BTHK = rotate(self._queries(x_BTD), *tokens.rope)
        if cache is None:
            k_BTHK = name_tensor(self._keys(self.key(latent_BTR), rotated_BTP, tokens.rope), "key")
            q_BTHK, v_BTHV = name_tensor(q_BTHK, "query"), name_tensor(self.value(latent_BTR), "value")
            y_BTHV = self_attention(q_BTHK, k_BTHK, v_BTHV, self.spec, tokens.segments, self.options, self.partitioner)
            return self.out(y_BTHV), None
        assert tokens.start is not None
        rotated_BTP = rotate(rotated_BTP[:, :, None], *tokens.rope)[:, :, 0]
        new = jnp.concatenate([rotated_BTP, latent_BTR], -1)
        cache = LatentCache(update_cache(cache.tokens, new, tokens.start))
        return self.out(self._attend_to_cache(q_BTHK, tokens.start, cache)), cache

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        """Projects query heads `[B, T, H, K]`; the features to rotate come first."""
        if self.query_down is not None and self.query_norm is not None:
            x_BTD = self.query_norm(self.query_down(x_BTD), RESIDUAL)
        return self.query(self.partitioner.gather_sequence(x_BTD, "heads"))

    def _keys(self, k_BTHN: jax.Array, rotated_BTP: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rotates the shared key and puts it before the other features of each head: `[B, T, H, K]`."""
        arrays = (k_BTHN, rotated_BTP, *rope)
        specs = tuple(jax.typeof(a).sharding.spec for a in arrays)

        def on_device(k: jax.Array, rotated: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
            # All heads share this key, so each device has a partial sum of its gradient: that of its own heads.
            rotated = jax.lax.pcast(rotated, tuple(specs[1].reduced), to="varying")
            rotated = rotate(rotated[:, :, None], cos, sin)
            return jnp.concatenate([jnp.broadcast_to(rotated, (*k.shape[:3], rotated.shape[-1])), k], axis=-1)

        return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0])(*arrays)

    def _attend_to_cache(self, q_BTHK: jax.Array, start_B: jax.Array, cache: LatentCache) -> jax.Array:
        """Computes attention to a cache that includes the tokens of the queries, `[B, T, H, V]`."""
        partitioner, rotated = self.partitioner, self.config.qk_rope_head_dim
        key_RHN, value_RHV = self.key.merged((None, "heads", None)), self.value.merged((None, "heads", None))

        def to_latent(q: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.concatenate([q[..., :rotated], jnp.einsum("bthn,rhn->bthr", q[..., rotated:], key)], axis=-1)

        def to_value(y: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.einsum("bthr,rhv->bthv", y[..., rotated:], value)

        latent_q = partitioner.map_local(to_latent, q_BTHK, key_RHN)  # [B, T, H, P + R]
        # The whole cache is used as values, which avoids a copy; `to_value` drops the rotated features.
        kv = cache.tokens[:, :, None]  # [B, S, 1, P + R]
        positions = cached_positions(start_B, q_BTHK, kv)
        y = dot_product_attention(latent_q, kv, kv, self.spec, platform=partitioner.platform, positions=positions)
        return partitioner.map_local(to_value, y, value_RHV)

    def empty_cache(self, num_layers: int, batch: int, length: int) -> LatentCache:
        """Returns a cache of all layers for `length` tokens of `batch` rows."""
        shape = (num_layers, batch, length, self.config.qk_rope_head_dim + self.config.kv_lora_rank)
        spec = self.partitioner.spec(None, "batch", None, None)
        return LatentCache(jnp.zeros(shape, self.partitioner.compute_dtype, out_sharding=spec))
