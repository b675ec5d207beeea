"""Attention of one stretch of queries on one stretch of keys, as a part of a longer softmax.

Where a softmax runs over keys that come one stretch after another, each stretch yields its own weighted mean of values
and the logarithm of its sum of weights; `merge` joins two of these (online softmax, Milakov and Gimelshein 2018). The
backward pass takes the logarithm of the whole sum, so that stretches need not know of one another (Dao et al. 2022,
FlashAttention, section 3.1). Queries come scaled; both stretches are of consecutive positions, `offset` apart.

Shape suffixes: B batch, H query heads, G key/value heads, R = H / G, T queries, S keys, K width of a query and key
head, V width of a value head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfra.ops.attention import See, splash_block, visible

type Segments = tuple[jax.Array, jax.Array] | None
"""Document ids of queries `[B, T]` and of keys `[B, S]`."""

NOTHING = -1e30
"""The logarithm of the sum of no weights: finite, so that two of them can be merged."""

CHUNK = 1024
"""Keys whose scores the plain form has at once."""


class Partial(NamedTuple):
    """A softmax over some of the keys.

    Attributes:
        out: mean of their values by weight, float32 `[B, H, T, V]`.
        lse: logarithm of the sum of weights, float32 `[B, H, T]`.
    """

    out: jax.Array
    lse: jax.Array


def merge(one: Partial, other: Partial) -> Partial:
    """The softmax over the keys of both; `other` may be without weight and without meaning where its `lse` is."""
    lse = jnp.logaddexp(one.lse, other.lse)
    out = jnp.where(other.lse[..., None] > NOTHING, other.out, 0.0)
    return Partial(one.out * jnp.exp(one.lse - lse)[..., None] + out * jnp.exp(other.lse - lse)[..., None], lse)


def reaches(see: See, offset: Any, queries: int, keys: int) -> Any:
    """Whether any of so many consecutive queries sees any of so many consecutive keys, documents aside.

    The offset is the position of the first query less that of the first key, a number or an array of them.
    """
    seen = True
    if see.causal:
        seen &= offset + queries - 1 >= 0
    if see.window is not None:
        seen &= offset - (keys - 1) < see.window
    return seen


@dataclass(frozen=True)
class Tiles:
    """One implementation.

    Attributes:
        forward: `(q_BHTK, k_BGSK, v_BGSV, segments, offset, see) -> Partial`.
        backward: `(q_BHTK, k_BGSK, v_BGSV, segments, offset, see, lse_BHT, di_BHT, do_BHTV) -> (dq, dk, dv)`, in the
            dtypes of `q`, `k`, `v` or more exact ones. `lse` is that of all keys, `di` the sum of `out * do` by query.
    """

    forward: Callable[..., Partial]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


# Plain JAX


def empty(q_BHTK: jax.Array, width: int) -> Partial:
    """The softmax over no keys, whose values would be so wide."""
    # Made from the queries, so that in a `shard_map` they differ over the same mesh axes by type.
    none_BHT = jnp.zeros_like(q_BHTK[..., 0], jnp.float32)
    return Partial(jnp.broadcast_to(none_BHT[..., None], (*none_BHT.shape, width)), none_BHT + NOTHING)


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    """`[B, H, ...]` to `[B, G, R, ...]`."""
    B, H, *rest = x.shape
    return x.reshape(B, groups, H // groups, *rest)


def _scores(q_BGRTK, k_BGSK, segments: Segments, offset, see: See) -> jax.Array:
    """Float32 `[B, G, R, T, S]`, capped; `NOTHING` where a key is not seen."""
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32)
    if see.softcap is not None:
        scores = see.softcap * jnp.tanh(scores / see.softcap)
    q_index = offset + jnp.arange(q_BGRTK.shape[3])[None]
    seen_BTS = visible(see, q_index, jnp.arange(k_BGSK.shape[2])[None], segments)
    return jnp.where(seen_BTS[:, None, None], scores, NOTHING)


def _chunk_forward(q_BHTK, k_BGSK, v_BGSV, segments: Segments, offset, see: See) -> Partial:
    q_BGRTK = _by_group(q_BHTK, k_BGSK.shape[1])
    scores = _scores(q_BGRTK, k_BGSK, segments, offset, see)
    largest = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("bgrts,bgsv->bgrtv", weights.astype(v_BGSV.dtype), v_BGSV, preferred_element_type=jnp.float32)
    out, lse = out / total[..., None], largest + jnp.log(total)
    lead = q_BHTK.shape[:-1]
    return Partial(out.reshape(*lead, v_BGSV.shape[-1]), lse.reshape(lead))


def _chunk_backward(q_BHTK, k_BGSK, v_BGSV, segments: Segments, offset, see: See, lse_BHT, di_BHT, do_BHTV):
    groups, f32 = k_BGSK.shape[1], jnp.float32
    q_BGRTK, do, lse, di = (_by_group(a, groups) for a in (q_BHTK, do_BHTV, lse_BHT, di_BHT))
    scores = _scores(q_BGRTK, k_BGSK, segments, offset, see)
    p = jnp.exp(scores - lse[..., None])
    dv = jnp.einsum("bgrts,bgrtv->bgsv", p.astype(do.dtype), do, preferred_element_type=f32)
    dp = jnp.einsum("bgrtv,bgsv->bgrts", do, v_BGSV, preferred_element_type=f32)
    ds = p * (dp - di[..., None])
    if see.softcap is not None:
        ds *= 1 - jnp.square(jnp.maximum(scores, -see.softcap) / see.softcap)  # p is zero where a key is not seen
    ds = ds.astype(q_BHTK.dtype)
    dq = jnp.einsum("bgrts,bgsk->bgrtk", ds, k_BGSK, preferred_element_type=f32)
    dk = jnp.einsum("bgrts,bgrtk->bgsk", ds, q_BGRTK, preferred_element_type=f32)
    return dq.reshape(q_BHTK.shape), dk, dv


def _chunks(k_BGSK, v_BGSV, segments: Segments) -> tuple[int, Any]:
    """The length of a chunk of keys, and `(first key, keys, values, ids)` of all chunks, stacked."""
    S = k_BGSK.shape[2]
    chunk = next(n for n in range(min(CHUNK, S), 0, -1) if S % n == 0)

    def split(x: jax.Array, dim: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:dim], S // chunk, chunk, *x.shape[dim + 1 :]), dim, 0)

    ids = None if segments is None else split(segments[1], 1)
    return chunk, (jnp.arange(0, S, chunk), split(k_BGSK, 2), split(v_BGSV, 2), ids)


def _plain_forward(q_BHTK, k_BGSK, v_BGSV, segments: Segments, offset, see: See) -> Partial:
    chunk, chunks = _chunks(k_BGSK, v_BGSV, segments)

    def body(found: Partial, xs: Any) -> tuple[Partial, None]:
        first, k, v, ids = xs
        both = None if segments is None else (segments[0], ids)

        def seen(found: Partial) -> Partial:
            return merge(found, _chunk_forward(q_BHTK, k, v, both, offset - first, see))

        here = reaches(see, offset - first, q_BHTK.shape[2], chunk)
        return jax.lax.cond(here, seen, lambda found: found, found), None

    return jax.lax.scan(body, empty(q_BHTK, v_BGSV.shape[-1]), chunks)[0]


def _plain_backward(q_BHTK, k_BGSK, v_BGSV, segments: Segments, offset, see: See, lse_BHT, di_BHT, do_BHTV):
    chunk, chunks = _chunks(k_BGSK, v_BGSV, segments)

    def body(dq: jax.Array, xs: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        first, k, v, ids = xs
        both = None if segments is None else (segments[0], ids)

        def seen(dq: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            d, dk, dv = _chunk_backward(q_BHTK, k, v, both, offset - first, see, lse_BHT, di_BHT, do_BHTV)
            return dq + d, dk, dv

        def unseen(dq: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            return dq, jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)

        dq, dk, dv = jax.lax.cond(reaches(see, offset - first, q_BHTK.shape[2], chunk), seen, unseen, dq)
        return dq, (dk, dv)

    def joined(chunks: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.moveaxis(chunks, 0, 2).reshape(like.shape)

    dq, (dk, dv) = jax.lax.scan(body, jnp.zeros_like(q_BHTK, jnp.float32), chunks)
    return dq, joined(dk, k_BGSK), joined(dv, v_BGSV)


PLAIN = Tiles(_plain_forward, _plain_backward)


# The kernels of splash attention, on TPU. Their entry point masks by numbers that are known when a program is traced;
# here the offset of a shard is known when it runs, so the mask is described to the kernels themselves.


def _mask(see: See, offset, queries: int, keys: int, *, by_key: bool) -> Any:
    """What a kernel is told: which blocks it computes, and which it fetches in the place of others."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    if not see.causal and see.window is None:
        return MaskInfo(None, None, None, None, None)
    block_q, block_k = splash_block(queries), splash_block(keys)
    first_q, first_k = jnp.arange(0, queries, block_q)[:, None], jnp.arange(0, keys, block_k)[None]
    seen = reaches(see, offset + first_q - first_k, block_q, block_k)
    dim = 0 if by_key else 1
    # What is seen of a row or column of blocks is one run: outside of it the nearest end stays where it is.
    begin = jnp.argmax(seen, axis=dim, keepdims=True)
    end = seen.shape[dim] - 1 - jnp.argmax(jnp.flip(seen, dim), axis=dim, keepdims=True)
    index = jax.lax.broadcasted_iota(begin.dtype, seen.shape, dim)
    return MaskInfo(
        data_next=jnp.clip(index, begin, end).astype(jnp.int16)[None],
        mask_next=None,
        block_mask=seen.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=(offset + jnp.arange(queries)).astype(jnp.int32),
    )


def _seen(see: See) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """The mask inside a block, from the positions of queries and keys."""
    if not see.causal and see.window is None:
        return None

    def seen(q_index: jax.Array, kv_index: jax.Array) -> jax.Array:
        distance = q_index - kv_index
        if see.window is None:
            return distance >= 0
        return (distance >= 0) & (distance < see.window) if see.causal else distance < see.window

    return seen


def _splash_forward(q_BHTK, k_BGSK, v_BGSV, segments: Segments, offset, see: See, *, interpret: bool) -> Partial:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    mask = _mask(see, offset, T, S, by_key=False)

    def row(q, k, v, ids):
        out, (lse,) = splash._splash_attention_forward(
            mask,
            q,
            k,
            v,
            None if ids is None else splash.SegmentIds(*ids),
            None,
            mask_value=splash.DEFAULT_MASK_VALUE,
            is_mqa=False,
            block_sizes=splash.BlockSizes(block_q=splash_block(T), block_kv=splash_block(S)),
            residual_checkpoint_name=None,
            save_residuals=True,
            mask_function=_seen(see),
            attn_logits_soft_cap=see.softcap,
            interpret=interpret,
        )
        return out, lse

    out, lse = jax.vmap(row, in_axes=(0, 0, 0, None if segments is None else 0))(q_BHTK, k_BGSK, v_BGSV, segments)
    return Partial(out.astype(jnp.float32), lse)


def _splash_backward(
    q_BHTK, k_BGSK, v_BGSV, segments: Segments, offset, see: See, lse_BHT, di_BHT, do_BHTV, *, interpret: bool
):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    block_q, block_k, minor = splash_block(T), splash_block(S), splash.QKVLayout.HEAD_DIM_MINOR
    by_query, by_key = (_mask(see, offset, T, S, by_key=by_key) for by_key in (False, True))

    def row(q, k, v, ids, *rest):
        both: dict[str, Any] = {
            "bq": block_q,
            "bkv": block_k,
            "is_mqa": False,
            "mask_value": splash.DEFAULT_MASK_VALUE,
            "attn_logits_soft_cap": see.softcap,
            "q_layout": minor,
            "k_layout": minor,
            "v_layout": minor,
            "mask_function": _seen(see),
            "interpret": interpret,
        }
        lse, di, do = rest
        arrays = (q, k, v, None if ids is None else splash.SegmentIds(*ids), None, lse, do, di)
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arrays, mask_info=by_key, bkv_compute=block_k, use_fused_bwd_kernel=False, **both
        )
        return splash._splash_attention_bwd_dq(*arrays, mask_info=by_query, **both), dk, dv

    in_axes = (0, 0, 0, None if segments is None else 0, 0, 0, 0)
    return jax.vmap(row, in_axes=in_axes)(q_BHTK, k_BGSK, v_BGSV, segments, lse_BHT, di_BHT, do_BHTV)


SPLASH = Tiles(partial(_splash_forward, interpret=False), partial(_splash_backward, interpret=False))
SPLASH_INTERPRETED = Tiles(partial(_splash_forward, interpret=True), partial(_splash_backward, interpret=True))
"""The same, interpreted: the numbers that a TPU would give, on any machine, slowly."""
