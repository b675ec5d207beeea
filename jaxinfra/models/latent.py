"""Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1): keys and values come from a small latent.

A token is projected down to a latent, and keys and values of all heads are projected up from it; queries likewise from
a latent of their own. Positions are in features apart: rotated ones of each query head, and one rotated key that all
heads share. While training, keys and values are made whole, and attention is that of any other model. Decoding
remembers latent and rotated key alone: the projection up to keys is moved to the queries, that of values to the
result, so that all heads read one key and value a token, as wide as a latent.

The latents are made where the stream is spread over positions, and are gathered in its place: they are narrower.

Shape suffixes: B batch, T queries, S cached tokens, D residual width, H heads, K width of a query and key head, N width
of its part without position, P width of its rotated part, V width of a value head, R width of a latent.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.config.limits import Count
from jaxinfra.models.attention import AttentionShape, Place, among_themselves, write
from jaxinfra.models.layers import BLOCK, Linear, Norm, Stack
from jaxinfra.ops.attention import AttentionSpec, Kernel, dot_product_attention
from jaxinfra.ops.context_cost import ContextMethod
from jaxinfra.ops.rope import rotate


@dataclass(frozen=True, kw_only=True)
class Latent:
    """The widths of latent attention: those of DeepSeek-V2-Lite, under the names in brackets in published configs.

    Attributes:
        kv_rank: width of the latent of keys and values (`kv_lora_rank`).
        q_rank: width of the latent of queries (`q_lora_rank`); None projects them from the stream.
        nope_dim: features of a query or key head that have no position (`qk_nope_head_dim`).
        rope_dim: features that are rotated; those of keys are shared by all heads (`qk_rope_head_dim`).
        value_dim: features of a value head (`v_head_dim`).
    """

    kv_rank: Count = 512
    q_rank: Count | None = None
    nope_dim: Count = 128
    rope_dim: Count = 64
    value_dim: Count = 128

    @property
    def head_dim(self) -> int:
        """Width of a query or key head."""
        return self.nope_dim + self.rope_dim


class Latents(NamedTuple):
    """What decoding remembers of earlier tokens, rotated key before latent: of one layer `[B, S, P + R]`."""

    tokens: jax.Array


class LatentAttention(nnx.Module):
    """Latent attention over a sequence, or over a cache and the tokens that follow it."""

    def __init__(self, latent: Latent, shape: AttentionShape, stack: Stack):
        self.latent, self.partitioner = latent, stack.partitioner
        self.kernel: Kernel | None = shape.kernel
        self.method: ContextMethod | Literal["auto"] = shape.method
        width, heads, linear = shape.width, shape.heads, partial(Linear, bias=False, stack=stack)
        down = partial(linear, (width,), axes=("embed", None), direction="along")
        norm = partial(Norm, kind="rmsnorm", eps=shape.norm_eps, offset=shape.norm_offset, stack=stack)

        # The rank of a projection is stored as the width of others is; only its heads are ever spread in use.
        def up(rank: int, head: int) -> Linear:
            # Made again from the latent in the backward pass, which is cheaper than to keep it (DeepSeek-AI 2024,
            # "DeepSeek-V3", section 3.2.3).
            return linear((rank,), (heads, head), ("embed", "heads", None), direction="inward", kept=False)

        self.query_down = down((latent.q_rank,)) if latent.q_rank else None
        self.query_norm = norm(latent.q_rank) if latent.q_rank else None
        self.query = up(latent.q_rank or width, latent.head_dim)
        self.kv_down = down((latent.kv_rank,))
        self.kv_norm = norm(latent.kv_rank)
        self.rotated_key = down((latent.rope_dim,))
        self.key = up(latent.kv_rank, latent.nope_dim)
        self.value = up(latent.kv_rank, latent.value_dim)
        self.out = linear(
            (heads, latent.value_dim), (width,), ("heads", None, "embed"), direction="outward", scale=shape.out_scale
        )

    def __call__(
        self, x_BTD: jax.Array, spec: AttentionSpec, place: Place, cache: Latents | None
    ) -> tuple[jax.Array, Latents | None]:
        """`[B, T, D]` with block positions to the same, and the cache with these tokens."""
        assert place.tables is not None
        latent_BTR = self.partitioner.gather_sequence(self.kv_norm(self.kv_down(x_BTD), BLOCK), "heads")
        rotated_BTP = self.partitioner.gather_sequence(self.rotated_key(x_BTD), "heads")
        q_BTHK = rotate(self._queries(x_BTD), *place.tables)
        if cache is None:
            k_BTHK = self._keys(self.key(latent_BTR), rotated_BTP, place.tables)
            v_BTHV = self.value(latent_BTR)
            y_BTHV = among_themselves(
                q_BTHK,
                k_BTHK,
                v_BTHV,
                spec,
                place.segments,
                partitioner=self.partitioner,
                kernel=self.kernel,
                method=self.method,
            )
            return self.out(y_BTHV), None
        assert place.start is not None
        rotated_BTP = rotate(rotated_BTP[:, :, None], *place.tables)[:, :, 0]
        cache = Latents(write(cache.tokens, jnp.concatenate([rotated_BTP, latent_BTR], -1), place.start))
        return self.out(self._from_cache(q_BTHK, spec, place.start, cache)), cache

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        """Query heads, the features that will be rotated first."""
        if self.query_down is None or self.query_norm is None:
            return self.query(self.partitioner.gather_sequence(x_BTD, "heads"))
        return self.query(self.partitioner.gather_sequence(self.query_norm(self.query_down(x_BTD), BLOCK), "heads"))

    def _keys(self, k_BTHN: jax.Array, rotated_BTP: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Key heads: the shared key, rotated, before the features of each head."""
        arrays = (k_BTHN, rotated_BTP, *tables)
        specs = tuple(jax.typeof(a).sharding.spec for a in arrays)

        def on_device(k: jax.Array, rotated: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
            # The gradient of what all heads share is a partial sum over the devices that heads are spread over.
            rotated = jax.lax.pcast(rotated, tuple(specs[1].reduced), to="varying")
            rotated = rotate(rotated[:, :, None], cos, sin)
            return jnp.concatenate([jnp.broadcast_to(rotated, (*k.shape[:3], rotated.shape[-1])), k], axis=-1)

        return jax.shard_map(on_device, in_specs=specs, out_specs=specs[0])(*arrays)

    def _from_cache(self, q_BTHK: jax.Array, spec: AttentionSpec, start: jax.Array, cache: Latents) -> jax.Array:
        """What queries see in a cache that has their tokens, `[B, T, H, V]`."""
        partitioner, rope = self.partitioner, self.latent.rope_dim
        key_RHN, value_RHV = (
            partitioner.gather_weight(up.weight[...], (None, "heads", None)) for up in (self.key, self.value)
        )

        def to_latent(q: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.concatenate([q[..., :rope], jnp.einsum("bthn,rhn->bthr", q[..., rope:], key)], axis=-1)

        def to_value(y: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.einsum("bthr,rhv->bthv", y[..., rope:], value)

        tokens_BS1R = cache.tokens[:, :, None]
        positions = (start + jnp.arange(q_BTHK.shape[1])[None], jnp.arange(tokens_BS1R.shape[1])[None])
        q_BTHR = partitioner.map_local(to_latent, q_BTHK, key_RHN)
        # Values are the tokens whole: what is too much of the result is dropped, and the cache is read once, as it is.
        y_BTHR = dot_product_attention(
            q_BTHR, tokens_BS1R, tokens_BS1R, spec, platform=partitioner.platform, positions=positions
        )
        return partitioner.map_local(to_value, y_BTHR, value_RHV)

    def empty_cache(self, layers: int, batch: int, length: int) -> Latents:
        """A cache for `length` tokens of `batch` rows, of all layers."""
        shape = (layers, batch, length, self.latent.rope_dim + self.latent.kv_rank)
        spec = self.partitioner.spec(None, "batch", None, None)
        return Latents(jnp.zeros(shape, self.partitioner.compute_dtype, out_sharding=spec))
