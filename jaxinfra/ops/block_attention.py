"""Attention of one block of queries to one block of keys, as part of a softmax over more keys.

The result for a block of keys is a weighted mean of values and a log-sum-exp; `merge_partials` merges two results
(online softmax, Milakov and Gimelshein 2018). The backward pass uses the log-sum-exp over all keys, so it can process
each block independently (Dao et al. 2022, FlashAttention, section 3.1).

This module has the implementation in JAX; `ops.splash_blocks` has the one for TPUs.

Shape suffixes: B batch, H query heads, G key/value heads, R = H / G, T queries, S keys, K head dim of queries and keys,
V head dim of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.ops.attention import AttentionSpec, Segments, attention_mask
from jaxinfra.ops.logits import softcapped

EMPTY_LSE = -1e30
"""The log-sum-exp over zero keys: finite, so that two of these can be merged."""

KEY_CHUNK = 1024
"""The JAX implementation holds the scores of at most this many keys at once."""

type Gradients = tuple[jax.Array, jax.Array, jax.Array]
"""Gradients of queries, keys and values, in their dtypes or float32."""


class KV(NamedTuple):
    """Keys `[B, G, S, K]`, values `[B, G, S, V]` and document ids `[B, S]`, or None without documents."""

    k: jax.Array
    v: jax.Array
    ids: jax.Array | None


class QKVBlock(NamedTuple):
    """Consecutive queries and consecutive keys.

    Attributes:
        q: scaled queries, `[B, H, T, K]`.
        q_ids: document ids of the queries, `[B, T]`, or None.
        kv: keys and values.
        offset: position of the first query minus position of the first key: 8 for queries 8 to 11 and keys 0 to 3.
    """

    q: jax.Array
    q_ids: jax.Array | None
    kv: KV
    offset: jax.Array

    @property
    def segments(self) -> Segments | None:
        """Document ids of queries and keys."""
        return None if self.q_ids is None or self.kv.ids is None else (self.q_ids, self.kv.ids)

    def is_visible(self, spec: AttentionSpec) -> jax.Array | bool:
        """Returns whether any query attends to any key; ignores document ids."""
        return block_is_visible(spec, self.offset, self.q.shape[2], self.kv.k.shape[2])


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


def block_is_visible[I: (np.ndarray, jax.Array)](spec: AttentionSpec, offset: I, q_len: int, kv_len: int) -> I | bool:
    """Returns whether any query of a block attends to any of its keys; arguments as in `QKVBlock`.

    Offsets are NumPy arrays in `context_cost`, which counts blocks before anything is traced.
    """
    visible = True
    if spec.causal:
        visible &= offset + q_len - 1 >= 0  # the last query and the first key
    if spec.window is not None:
        visible &= offset - (kv_len - 1) < spec.window  # the first query and the last key
    return visible


def position_dim(x: jax.Array) -> int:
    """Returns which dimension of queries, keys, values (`[B, heads, T, K]`) or ids (`[B, T]`) counts positions."""
    return 1 if x.ndim == 2 else 2


def empty_partial(q_BHTK: jax.Array, value_dim: int) -> SoftmaxPartial:
    """Returns the attention over zero keys."""
    # Computed from the queries, so that in a `shard_map` its type varies over the same mesh axes.
    zero_BHT = jnp.zeros_like(q_BHTK[..., 0], jnp.float32)
    return SoftmaxPartial(jnp.broadcast_to(zero_BHT[..., None], (*zero_BHT.shape, value_dim)), zero_BHT + EMPTY_LSE)


def merge_partials(a: SoftmaxPartial, b: SoftmaxPartial) -> SoftmaxPartial:
    """Returns the attention over the keys of both; `b.out` is ignored where `b.lse` is `EMPTY_LSE`."""
    lse = jnp.logaddexp(a.lse, b.lse)
    # If all keys of `b` are masked for a query, `b.out` is a mean of masked values. That of `a` is zero where it has
    # no keys, as every running total starts from `empty_partial`.
    b_out = jnp.where(b.lse[..., None] > EMPTY_LSE, b.out, 0.0)
    return SoftmaxPartial(a.out * jnp.exp(a.lse - lse)[..., None] + b_out * jnp.exp(b.lse - lse)[..., None], lse)


def _split_heads(x: jax.Array, kv_heads: int) -> jax.Array:
    """Reshapes `[B, H, ...]` to `[B, G, R, ...]`."""
    B, H, *rest = x.shape
    return x.reshape(B, kv_heads, H // kv_heads, *rest)


def _scores(q_BGRTK: jax.Array, block: QKVBlock, spec: AttentionSpec) -> jax.Array:
    """Returns float32 `[B, G, R, T, S]` after the soft cap; `EMPTY_LSE` where a key is masked."""
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, block.kv.k, preferred_element_type=jnp.float32)
    scores = softcapped(scores, spec.softcap)
    positions = (block.offset + jnp.arange(block.q.shape[2])[None], jnp.arange(block.kv.k.shape[2])[None])
    mask_BTS = attention_mask(spec, positions, block.segments)
    return jnp.where(mask_BTS[:, None, None], scores, EMPTY_LSE)


def _chunk_forward(block: QKVBlock, spec: AttentionSpec) -> SoftmaxPartial:
    k, v, _ = block.kv
    scores = _scores(_split_heads(block.q, k.shape[1]), block, spec)
    largest = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("bgrts,bgsv->bgrtv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out, lse = out / total[..., None], largest + jnp.log(total)
    B, H, T, _ = block.q.shape
    return SoftmaxPartial(out.reshape(B, H, T, -1), lse.reshape(B, H, T))


def _chunk_backward(block: QKVBlock, spec: AttentionSpec, gradient: OutputGradient) -> Gradients:
    # As in FlashAttention, p are the weights of the softmax, and d before a name is the gradient of what it names.
    k, v, _ = block.kv
    f32, kv_heads = jnp.float32, k.shape[1]
    q_BGRTK = _split_heads(block.q, kv_heads)
    lse, di = _split_heads(gradient.lse, kv_heads), _split_heads(gradient.di, kv_heads)
    do = _split_heads(gradient.do, kv_heads)
    scores = _scores(q_BGRTK, block, spec)
    p = jnp.exp(scores - lse[..., None])
    dv = jnp.einsum("bgrts,bgrtv->bgsv", p.astype(do.dtype), do, preferred_element_type=f32)
    dp = jnp.einsum("bgrtv,bgsv->bgrts", do, v, preferred_element_type=f32)
    ds = p * (dp - di[..., None])
    if spec.softcap is not None:
        # The lower bound avoids overflow for masked keys, whose scores are `EMPTY_LSE` and whose p is 0.
        ds *= 1 - jnp.square(jnp.maximum(scores, -spec.softcap) / spec.softcap)
    ds = ds.astype(block.q.dtype)
    dq = jnp.einsum("bgrts,bgsk->bgrtk", ds, k, preferred_element_type=f32)
    dk = jnp.einsum("bgrts,bgrtk->bgsk", ds, q_BGRTK, preferred_element_type=f32)
    return dq.reshape(block.q.shape), dk, dv


type Chunk = tuple[jax.Array, KV]
"""The index of a chunk's first key in its block, and the chunk's keys and values.

`_split_keys` stacks all chunks of a block in a new first dimension, for a scan.
"""


def _split_keys(kv: KV) -> Chunk:
    """Splits a block into stacked chunks of equal size, of at most `KEY_CHUNK` keys."""
    num_keys = kv.k.shape[2]
    chunk_len = next(n for n in range(min(KEY_CHUNK, num_keys), 0, -1) if num_keys % n == 0)

    def split(x: jax.Array) -> jax.Array:
        dim = position_dim(x)
        return jnp.moveaxis(x.reshape(*x.shape[:dim], -1, chunk_len, *x.shape[dim + 1 :]), dim, 0)

    return jnp.arange(0, num_keys, chunk_len), jax.tree.map(split, kv)


def _with_chunk(block: QKVBlock, chunk: Chunk) -> QKVBlock:
    first_key, kv = chunk
    return block._replace(kv=kv, offset=block.offset - first_key)


def _forward(block: QKVBlock, spec: AttentionSpec) -> SoftmaxPartial:
    def body(total: SoftmaxPartial, chunk: Chunk) -> tuple[SoftmaxPartial, None]:
        part = _with_chunk(block, chunk)

        def add(total: SoftmaxPartial) -> SoftmaxPartial:
            return merge_partials(total, _chunk_forward(part, spec))

        return jax.lax.cond(part.is_visible(spec), add, lambda total: total, total), None

    return jax.lax.scan(body, empty_partial(block.q, block.kv.v.shape[-1]), _split_keys(block.kv))[0]


def _backward(block: QKVBlock, spec: AttentionSpec, gradient: OutputGradient) -> Gradients:
    def body(dq: jax.Array, chunk: Chunk) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        part = _with_chunk(block, chunk)

        def add(dq: jax.Array) -> Gradients:
            chunk_dq, dk, dv = _chunk_backward(part, spec, gradient)
            return dq + chunk_dq, dk, dv

        def skip(dq: jax.Array) -> Gradients:
            return dq, jnp.zeros_like(part.kv.k, jnp.float32), jnp.zeros_like(part.kv.v, jnp.float32)

        dq, dk, dv = jax.lax.cond(part.is_visible(spec), add, skip, dq)
        return dq, (dk, dv)

    def join(chunks: jax.Array, like: jax.Array) -> jax.Array:
        return jnp.moveaxis(chunks, 0, 2).reshape(like.shape)

    dq, (dk, dv) = jax.lax.scan(body, jnp.zeros_like(block.q, jnp.float32), _split_keys(block.kv))
    return dq, join(dk, block.kv.k), join(dv, block.kv.v)


JAX_BLOCKS = BlockAttention(_forward, _backward)
"""The implementation in JAX, for all platforms."""
