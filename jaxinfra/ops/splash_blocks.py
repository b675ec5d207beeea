"""Attention over one block of keys with the splash attention kernels, on TPU (see `ops.block_attention`).

The kernels' public entry point needs the mask at trace time. Here the offset of a block depends on the shard and is
known only at run time, so the private kernel functions are called with a traced mask.

Import this module where it is used: the import of Pallas takes a second.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from jaxinfra.ops.attention import AttentionSpec, Segments, splash_block
from jaxinfra.ops.block_attention import (
    BlockAttention,
    Gradients,
    OutputGradient,
    QKVBlock,
    SoftmaxPartial,
    block_is_visible,
)


def mask_info(spec: AttentionSpec, offset: jax.Array, q_len: int, kv_len: int, *, by_key: bool) -> MaskInfo:
    """Returns which tiles of the scores a kernel computes, and which tile it prefetches instead of a skipped one.

    `by_key` tells whether the kernel's inner loop runs over queries for each key, instead of over keys for each query.
    """
    if not spec.causal and spec.window is None:
        return MaskInfo(None, None, None, None, None)
    tile_q, tile_k = splash_block(q_len), splash_block(kv_len)
    first_q, first_k = jnp.arange(0, q_len, tile_q)[:, None], jnp.arange(0, kv_len, tile_k)[None]
    visible = jnp.asarray(block_is_visible(spec, offset + first_q - first_k, tile_q, tile_k))
    inner = 0 if by_key else 1  # the dimension of `visible` that the kernel's inner loop runs over
    # The visible tiles of a row or column are contiguous. For a skipped tile the kernel fetches the nearest visible
    # one, which it already has or needs next: for visible tiles [0, 1, 1, 0] it fetches [1, 1, 2, 2].
    begin = jnp.argmax(visible, axis=inner, keepdims=True)
    end = visible.shape[inner] - 1 - jnp.argmax(jnp.flip(visible, inner), axis=inner, keepdims=True)
    index = jax.lax.broadcasted_iota(begin.dtype, visible.shape, inner)
    q_positions: Any = (offset + jnp.arange(q_len)).astype(jnp.int32)  # `MaskInfo` declares a NumPy array
    return MaskInfo(
        data_next=jnp.clip(index, begin, end).astype(jnp.int16)[None],
        mask_next=None,
        block_mask=visible.astype(jnp.int8)[None],
        partial_mask_blocks=None,
        q_sequence=q_positions,
    )


def _mask_function(spec: AttentionSpec) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
    """Returns the mask inside a tile as a function of the positions of queries and keys."""
    if not spec.causal and spec.window is None:
        return None

    def mask(q_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        distance = q_positions - kv_positions
        if spec.window is None:
            return distance >= 0
        return (distance >= 0) & (distance < spec.window) if spec.causal else distance < spec.window

    return mask


def _kernel_options(spec: AttentionSpec, interpret: bool) -> dict[str, Any]:
    return {
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "mask_function": _mask_function(spec),
        "attn_logits_soft_cap": spec.softcap,
        "interpret": interpret,
    }


def _segment_ids(segments: Segments | None) -> splash.SegmentIds | None:
    return None if segments is None else splash.SegmentIds(*segments)


def _forward(block: QKVBlock, spec: AttentionSpec, *, interpret: bool) -> SoftmaxPartial:
    q_len, kv_len = block.q.shape[2], block.kv.k.shape[2]
    mask = mask_info(spec, block.offset, q_len, kv_len, by_key=False)

    def one_sequence(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None) -> SoftmaxPartial:
        out, (lse,) = splash._splash_attention_forward(
            mask,
            q,
            k,
            v,
            _segment_ids(segments),
            None,  # sinks: `ops.context_attention` applies them
            block_sizes=splash.BlockSizes(block_q=splash_block(q_len), block_kv=splash_block(kv_len)),
            residual_checkpoint_name=None,
            save_residuals=True,
            **_kernel_options(spec, interpret),
        )
        return SoftmaxPartial(out, lse)

    out, lse = jax.vmap(one_sequence)(block.q, block.kv.k, block.kv.v, block.segments)
    return SoftmaxPartial(out.astype(jnp.float32), lse)


def _backward(block: QKVBlock, spec: AttentionSpec, gradient: OutputGradient, *, interpret: bool) -> Gradients:
    q_len, kv_len, minor = block.q.shape[2], block.kv.k.shape[2], splash.QKVLayout.HEAD_DIM_MINOR
    dq_mask = mask_info(spec, block.offset, q_len, kv_len, by_key=False)
    dkv_mask = mask_info(spec, block.offset, q_len, kv_len, by_key=True)
    sizes = {"bq": splash_block(q_len), "bkv": splash_block(kv_len)}
    options = {**sizes, "q_layout": minor, "k_layout": minor, "v_layout": minor, **_kernel_options(spec, interpret)}

    def one_sequence(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, gradient: OutputGradient
    ) -> Gradients:
        lse, di, do = gradient
        arrays = (q, k, v, _segment_ids(segments), None, lse, do, di)  # None: no sinks
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arrays, mask_info=dkv_mask, bkv_compute=splash_block(kv_len), use_fused_bwd_kernel=False, **options
        )
        return splash._splash_attention_bwd_dq(*arrays, mask_info=dq_mask, **options), dk, dv

    return jax.vmap(one_sequence)(block.q, block.kv.k, block.kv.v, block.segments, gradient)


SPLASH_BLOCKS = BlockAttention(partial(_forward, interpret=False), partial(_backward, interpret=False))
SPLASH_BLOCKS_INTERPRETED = BlockAttention(partial(_forward, interpret=True), partial(_backward, interpret=True))
"""`SPLASH_BLOCKS` in Pallas' interpreter: the results of a TPU on any machine, but slow."""
