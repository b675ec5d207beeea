"""Attention of one block of queries to one block of keys, as part of a softmax over more keys.

The result for a block of keys is a weighted mean of values and a log-sum-exp; `merge_partials` merges two results
(online softmax, Milakov and Gimelshein 2018). The backward pass uses the log-sum-exp over all keys, so it can process
each block independently (Dao et al. 2022, FlashAttention, section 3.1).

Shape suffixes: B batch, H query heads, G key/value heads, R = H / G, T queries, S keys, K head dim of queries and keys,
V head dim of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.ops.attention import AttentionSpec, Segments, attention_mask, splash_block

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

EMPTY_LSE = -1e30
"""The log-sum-exp over zero keys: finite, so that two of these can be merged."""

KEY_CHUNK = 1024
"""The JAX implementation holds the scores of at most this many keys at once."""

type Gradients = tuple[jax.Array, jax.Array, jax.Array]
"""Gradients of queries, keys and values, in their dtypes or float32."""


class QKVBlock(NamedTuple):
    """Consecutive queries and consecutive keys.

    Attributes:
        q: scaled queries, `[B, H, T, K]`.
        k: keys, `[B, G, S, K]`.
        v: values, `[B, G, S, V]`.
        segments: document ids.
        offset: position of the first query minus position of the first key.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    segments: Segments | None
    offset: jax.Array


class SoftmaxPartial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: weighted mean of values, float32 `[B, H, T, V]`.
        lse: log-sum-exp of scores, float32 `[B, H, T]`.
    """

    out: jax.Array
    lse: jax.Array


class OutputGradient(NamedTuple):
    """Inputs of a block's backward pass that come from the whole softmax.

    Attributes:
        lse: log-sum-exp over all keys, `[B, H, T]`.
        di: sum of `out * do` over V, `[B, H, T]`.
        do: gradient of the output, `[B, H, T, V]`.
    """

    lse: jax.Array
    di: jax.Array
    do: jax.Array


@dataclass(frozen=True)
class BlockAttention:
    """An implementation of attention over one block of keys."""

    forward: Callable[[QKVBlock, AttentionSpec], SoftmaxPartial]
    backward: Callable[[QKVBlock, AttentionSpec, OutputGradient], Gradients]


def empty_partial(q_BHTK: jax.Array, value_dim: int) -> SoftmaxPartial:
    """Returns the attention over zero keys."""
    # Computed from the queries, so that in a `shard_map` its type varies over the same mesh axes.
    zero_BHT = jnp.zeros_like(q_BHTK[..., 0], jnp.float32)
    return SoftmaxPartial(jnp.broadcast_to(zero_BHT[..., None], (*zero_BHT.shape, value_dim)), zero_BHT + EMPTY_LSE)


def merge_partials(a: SoftmaxPartial, b: SoftmaxPartial) -> SoftmaxPartial:
    """Returns the attention over the keys of both; `b.out` is ignored where `b.lse` is `EMPTY_LSE`."""
    lse = jnp.logaddexp(a.lse, b.lse)
    b_out = jnp.where(b.lse[..., None] > EMPTY_LSE, b.out, 0.0)
    return SoftmaxPartial(a.out * jnp.exp(a.lse - lse)[..., None] + b_out * jnp.exp(b.lse - lse)[..., None], lse)


def block_is_visible[I: (np.ndarray, jax.Array)](spec: AttentionSpec, offset: I, q_len: int, kv_len: int) -> I | bool:
    """Returns whether any query of a block attends to any of its keys; ignores document ids.

    Args:
        spec: `causal` and `window` are used.
        offset: position of the first query minus position of the first key.
        q_len: number of queries.
        kv_len: number of keys.
    """
    visible = True
    if spec.causal:
        visible &= offset + q_len - 1 >= 0
    if spec.window is not None:
        visible &= offset - (kv_len - 1) < spec.window
    return visible


# In JAX


def _split_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes `[B, H, ...]` to `[B, G, R, ...]`."""
    B, H, *rest = x.shape
    return x.reshape(B, kv_heads, H // kv_heads, *rest)


def _scores(q_BGRTK: jax.Array, block: QKVBlock, spec: AttentionSpec) -> jax.Array:
    """Returns float32 `[B, G, R, T, S]` after the soft cap; `EMPTY_LSE` where a key is masked."""
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, block.k, preferred_element_type=jnp.float32)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    positions = (block.offset + jnp.arange(block.q.shape[2])[None], jnp.arange(block.k.shape[2])[None])
    mask_BTS = attention_mask(spec, positions, block.segments)
    return jnp.where(mask_BTS[:, None, None], scores, EMPTY_LSE)


def _chunk_forward(block: QKVBlock, spec: AttentionSpec) -> SoftmaxPartial:
    scores = _scores(_split_heads(block.q, block.k.shape[1]), block, spec)
    largest = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("bgrts,bgsv->bgrtv", weights.astype(block.v.dtype), block.v, preferred_element_type=jnp.float32)
    out, lse = out / total[..., None], largest + jnp.log(total)
    B, H, T, _ = block.q.shape
    return SoftmaxPartial(out.reshape(B, H, T, -1), lse.reshape(B, H, T))


def _chunk_backward(block: QKVBlock, spec: AttentionSpec, gradient: OutputGradient) -> Gradients:
    f32 = jnp.float32
    q_BGRTK, lse, di, do = (_split_heads(a, block.k.shape[1]) for a in (block.q, *gradient))
    scores = _scores(q_BGRTK, block, spec)
    p = jnp.exp(scores - lse[..., None])
    dv = jnp.einsum("bgrts,bgrtv->bgsv", p.astype(do.dtype), do, preferred_element_type=f32)
    dp = jnp.einsum("bgrtv,bgsv->bgrts", do, block.v, preferred_element_type=f32)
    ds = p * (dp - di[..., None])
    if spec.softcap is not None:
        # The lower bound avoids overflow for masked keys, whose scores are `EMPTY_LSE` and whose p is 0.
        ds *= 1 - jnp.square(jnp.maximum(scores, -spec.softcap) / spec.softcap)
    ds = ds.astype(block.q.dtype)
    dq = jnp.einsum("bgrts,bgsk->bgrtk", ds, block.k, preferred_element_type=f32)
    dk = jnp.einsum("bgrts,bgrtk->bgsk", ds, q_BGRTK, preferred_element_type=f32)
    return dq.reshape(block.q.shape), dk, dv


type Chunk = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""First key, keys, values and document ids."""


def _split_keys(block: QKVBlock) -> tuple[int, Chunk]:
    """Returns the number of keys per chunk, and all chunks, stacked."""
    S = block.k.shape[2]
    chunk_len = next(n for n in range(min(KEY_CHUNK, S), 0, -1) if S % n == 0)

    def split(x: jax.Array, dim: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:dim], S // chunk_len, chunk_len, *x.shape[dim + 1 :]), dim, 0)

    ids = None if block.segments is None else split(block.segments[1], 1)
    return chunk_len, (jnp.arange(0, S, chunk_len), split(block.k, 2), split(block.v, 2), ids)


def _with_chunk(block: QKVBlock, first: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> QKVBlock:
    segments = None if block.segments is None or ids is None else (block.segments[0], ids)
    return QKVBlock(block.q, k, v, segments, block.offset - first)


def _jax_forward(block: QKVBlock, spec: AttentionSpec) -> SoftmaxPartial:
    chunk_len, chunks = _split_keys(block)

    def body(total: SoftmaxPartial, xs: Chunk) -> tuple[SoftmaxPartial, None]:
        part = _with_chunk(block, *xs)

        def add(total: SoftmaxPartial) -> SoftmaxPartial:
            return merge_partials(total, _chunk_forward(part, spec))

        visible = block_is_visible(spec, part.offset, block.q.shape[2], chunk_len)
        return jax.lax.cond(visible, add, lambda total: total, total), None

    return jax.lax.scan(body, empty_partial(block.q, block.v.shape[-1]), chunks)[0]


def _jax_backward(block: QKVBlock, spec: AttentionSpec, gradient: OutputGradient) -> Gradients:
    chunk_len, chunks = _split_keys(block)

    def body(dq: jax.Array, xs: Chunk) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        part = _with_chunk(block, *xs)

        def add(dq: jax.Array) -> Gradients:
            d, dk, dv = _chunk_backward(part, spec, gradient)
            return dq + d, dk, dv

        def skip(dq: jax.Array) -> Gradients:
            return dq, jnp.zeros_like(part.k, jnp.float32), jnp.zeros_like(part.v, jnp.float32)

        dq, dk, dv = jax.lax.cond(block_is_visible(spec, part.offset, block.q.shape[2], chunk_len), add, skip, dq)
        return dq, (dk, dv)

    def join(chunks: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.moveaxis(chunks, 0, 2).reshape(like.shape)

    dq, (dk, dv) = jax.lax.scan(body, jnp.zeros_like(block.q, jnp.float32), chunks)
    return dq, join(dk, block.k), join(dv, block.v)


JAX_BLOCKS = BlockAttention(_jax_forward, _jax_backward)


# With the splash attention kernels, on TPU. Their public entry point needs the mask at trace time. Here the offset
# depends on the shard and is known only at run time, so the private kernel functions are called with a traced mask.


def _mask_info(spec: AttentionSpec, offset: jax.Array, q_len: int, kv_len: int, *, by_key: bool) -> "MaskInfo":
    """Returns which blocks a kernel computes, and which block it prefetches instead of a skipped one."""
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    if not spec.causal and spec.window is None:
        return MaskInfo(None, None, None, None, None)
    block_q, block_k = splash_block(q_len), splash_block(kv_len)
    first_q, first_k = jnp.arange(0, q_len, block_q)[:, None], jnp.arange(0, kv_len, block_k)[None]
    visible = jnp.asarray(block_is_visible(spec, offset + first_q - first_k, block_q, block_k))
    dim = 0 if by_key else 1
    # The visible blocks of a row or column are contiguous. For a skipped block the kernel fetches the nearest visible
    # one, which it already has or needs next.
    begin = jnp.argmax(visible, axis=dim, keepdims=True)
    end = visible.shape[dim] - 1 - jnp.argmax(jnp.flip(visible, dim), axis=dim, keepdims=True)
    index = jax.lax.broadcasted_iota(begin.dtype, visible.shape, dim)
    q_positions: Any = (offset + jnp.arange(q_len)).astype(jnp.int32)  # annotated as NumPy arrays there
    return MaskInfo(
        data_next=jnp.clip(index, begin, end).astype(jnp.int16)[None],
        mask_next=None,
        block_mask=visible.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=q_positions,
    )


def _mask_function(spec: AttentionSpec) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Returns the mask inside a block as a function of the positions of queries and keys."""
    if not spec.causal and spec.window is None:
        return None

    def mask(q_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        distance = q_positions - kv_positions
        if spec.window is None:
            return distance >= 0
        return (distance >= 0) & (distance < spec.window) if spec.causal else distance < spec.window

    return mask


def _kernel_options(spec: AttentionSpec, interpret: bool) -> dict[str, Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    return {
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "mask_function": _mask_function(spec),
        "attn_logits_soft_cap": spec.softcap,
        "interpret": interpret,
    }


def _splash_forward(block: QKVBlock, spec: AttentionSpec, *, interpret: bool) -> SoftmaxPartial:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, S = block.q.shape[2], block.k.shape[2]
    mask = _mask_info(spec, block.offset, T, S, by_key=False)

    def one_sequence(q: jax.Array, k: jax.Array, v: jax.Array, ids: Segments | None) -> SoftmaxPartial:
        out, (lse,) = splash._splash_attention_forward(
            mask,
            q,
            k,
            v,
            None if ids is None else splash.SegmentIds(*ids),
            None,
            block_sizes=splash.BlockSizes(block_q=splash_block(T), block_kv=splash_block(S)),
            residual_checkpoint_name=None,
            save_residuals=True,
            **_kernel_options(spec, interpret),
        )
        return SoftmaxPartial(out, lse)

    in_axes = (0, 0, 0, None if block.segments is None else 0)
    out, lse = jax.vmap(one_sequence, in_axes=in_axes)(block.q, block.k, block.v, block.segments)
    return SoftmaxPartial(out.astype(jnp.float32), lse)


def _splash_backward(block: QKVBlock, spec: AttentionSpec, gradient: OutputGradient, *, interpret: bool) -> Gradients:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, S, minor = block.q.shape[2], block.k.shape[2], splash.QKVLayout.HEAD_DIM_MINOR
    dq_mask, dkv_mask = (_mask_info(spec, block.offset, T, S, by_key=by_key) for by_key in (False, True))
    sizes = {"bq": splash_block(T), "bkv": splash_block(S)}
    options = {**sizes, "q_layout": minor, "k_layout": minor, "v_layout": minor, **_kernel_options(spec, interpret)}

    def one_sequence(
        q: jax.Array, k: jax.Array, v: jax.Array, ids: Segments | None, gradient: OutputGradient
    ) -> Gradients:
        lse, di, do = gradient
        arrays = (q, k, v, None if ids is None else splash.SegmentIds(*ids), None, lse, do, di)
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arrays, mask_info=dkv_mask, bkv_compute=splash_block(S), use_fused_bwd_kernel=False, **options
        )
        return splash._splash_attention_bwd_dq(*arrays, mask_info=dq_mask, **options), dk, dv

    in_axes = (0, 0, 0, None if block.segments is None else 0, 0)
    return jax.vmap(one_sequence, in_axes=in_axes)(block.q, block.k, block.v, block.segments, gradient)


SPLASH_BLOCKS = BlockAttention(partial(_splash_forward, interpret=False), partial(_splash_backward, interpret=False))
SPLASH_BLOCKS_INTERPRETED = BlockAttention(
    partial(_splash_forward, interpret=True), partial(_splash_backward, interpret=True)
)
"""`SPLASH_BLOCKS` in Pallas' interpreter: the results of a TPU on any machine, but slow."""
