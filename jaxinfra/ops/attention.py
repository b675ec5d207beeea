"""Scaled dot-product attention: one `AttentionSpec`, several kernels.

A kernel is used only if it supports the whole spec, including the segment ids of packed documents.

Shape suffixes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, K head dim of queries and keys,
V head dim of values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxinfra.errors import ConfigError
from jaxinfra.ops.logits import softcapped

type Kernel = Literal["reference", "xla", "cudnn", "splash"]
type Segments = tuple[jax.Array, jax.Array]
"""Document ids of queries `[B, T]` and of keys `[B, S]`: a query attends only to keys with its own id."""

type Positions = tuple[jax.Array, jax.Array]
"""Positions of queries `[B or 1, T]` and of keys `[B or 1, S]`."""

ATTENTION_RESIDUALS = "attention_residuals"
"""The checkpoint name of an output and its log-sum-exp where a gradient needs both: `models.remat` saves them by it."""

ATTENTION_OUT = "attention_out"
"""The checkpoint name of the output of other kernels."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """Which keys a query attends to, and how scores are scaled.

    Attributes:
        causal: a query attends only to keys at its own position or before.
        window: a query at position i attends only to keys after position `i - window`.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        scale: factor on the dot products; None is `1 / sqrt(K)`.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def qk_scale(self, head_dim: int) -> float:
        """Returns the factor on the dot products of queries and keys."""
        return head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, kw_only=True)
class KernelInputs:
    """The sizes and the dtype that decide whether a kernel can run.

    Attributes:
        explicit_positions: whether positions are arguments, instead of 0, 1, 2, ...
    """

    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    explicit_positions: bool
    dtype: jnp.dtype


def attention_mask(spec: AttentionSpec, positions: Positions, segments: Segments | None) -> jax.Array:
    """Returns the mask, bool `[B or 1, T, S]`: True where a query attends to a key."""
    q_positions, kv_positions = positions
    distance = q_positions[:, :, None] - kv_positions[:, None, :]
    mask = jnp.ones_like(distance, bool)
    if spec.causal:
        mask &= distance >= 0
    if spec.window is not None:
        mask &= distance < spec.window
    return mask if segments is None else mask & _same_document(segments)


def _same_document(segments: Segments) -> jax.Array:
    q_ids, kv_ids = segments
    return q_ids[:, :, None] == kv_ids[:, None, :]


def reference(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    spec: AttentionSpec,
    segments: Segments | None = None,
    positions: Positions | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Computes attention by its definition, with scores and softmax in float32. Memory grows with `T * S`.

    A sink is the score of an additional key of its head, whose value is zero. If all keys of a query are masked, its
    output is the mean of all values.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    if T == 1:
        scores_BGRTS = lax.platform_dependent(q_BTGRK, k_BSGK, cpu=_scores_of_one, default=_scores)
    else:
        scores_BGRTS = _scores(q_BTGRK, k_BSGK)
    scores_BGRTS = softcapped(scores_BGRTS * spec.qk_scale(K), spec.softcap)
    if positions is None:
        positions = jnp.arange(T)[None], jnp.arange(k_BSGK.shape[1])[None]
    mask_BTS = attention_mask(spec, positions, segments)
    # Finite, so that a query without visible keys gets no NaN.
    scores_BGRTS = jnp.where(mask_BTS[:, None, None], scores_BGRTS, -1e30)
    if sinks_H is None:
        weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGV.dtype)
    else:
        sinks = sinks_H.astype(jnp.float32).reshape(G, H // G, 1, 1)
        lse = jnp.logaddexp(jax.nn.logsumexp(scores_BGRTS, axis=-1, keepdims=True), sinks)
        weights_BGRTS = jnp.exp(scores_BGRTS - lse).astype(v_BSGV.dtype)
    if T == 1:
        y_BTGRV = lax.platform_dependent(weights_BGRTS, v_BSGV, cpu=_mean_for_one, default=_weighted_mean)
    else:
        y_BTGRV = _weighted_mean(weights_BGRTS, v_BSGV)
    return y_BTGRV.reshape(B, T, H, v_BSGV.shape[-1])


def _scores(q_BTGRK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    return jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)


def _weighted_mean(weights_BGRTS: jax.Array, v_BSGV: jax.Array) -> jax.Array:
    return jnp.einsum("bgrts,bsgv->btgrv", weights_BGRTS, v_BSGV)


# XLA's CPU backend has no fast kernel for the products of one query, which it fuses into loops if they are sums.


def _scores_of_one(q_B1GRK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    k_BGSK = jnp.swapaxes(k_BSGK, 1, 2).astype(jnp.float32)
    return jnp.sum(q_B1GRK[:, 0, :, :, None] * k_BGSK[:, :, None], axis=-1)[:, :, :, None]


def _mean_for_one(weights_BGR1S: jax.Array, v_BSGV: jax.Array) -> jax.Array:
    v_BGSV = jnp.swapaxes(v_BSGV, 1, 2)
    product_BGRSV = weights_BGR1S[:, :, :, 0, :, None].astype(jnp.float32) * v_BGSV[:, :, None]
    return jnp.sum(product_BGRSV, axis=3)[:, None].astype(v_BSGV.dtype)


def _jax_nn_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    spec: AttentionSpec,
    segments: Segments | None = None,
    *,
    implementation: Literal["xla", "cudnn"],
) -> jax.Array:
    # The numbers of keys before and after its own position that a query sees.
    window = None if spec.window is None else (spec.window - 1, 0 if spec.causal else k_BSGK.shape[1])
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        mask=None if segments is None else _same_document(segments)[:, None],
        scale=spec.scale,
        is_causal=spec.causal,
        local_window_size=window,
        implementation=implementation,
    )


def _unsupported_by_xla(spec: AttentionSpec, inputs: KernelInputs) -> str | None:
    if spec.softcap is not None:
        return "it has no soft cap"
    if inputs.value_dim != inputs.head_dim:
        return f"its values must be as wide as its keys, not {inputs.value_dim} and {inputs.head_dim}"
    return "it takes no explicit positions" if inputs.explicit_positions else None


def _unsupported_by_cudnn(spec: AttentionSpec, inputs: KernelInputs) -> str | None:
    if inputs.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {jnp.dtype(inputs.dtype).name}"
    if inputs.head_dim % 8 or inputs.head_dim > 128:
        return f"its head_dim must be a multiple of 8 and at most 128, not {inputs.head_dim}"
    if spec.window is not None and not spec.causal:
        return "its window needs a causal mask"
    return _unsupported_by_xla(spec, inputs)


def splash_block(length: int) -> int:
    """Returns the largest multiple of 128, at most 512, that divides `length`; 0 if there is none.

    512 compiles for every TPU from v5e on at length 8192; 1024 and above overflow the scratch memory of some.
    """
    return next((block for block in (512, 384, 256, 128) if length % block == 0), 0)


def _splash(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    spec: AttentionSpec,
    segments: Segments | None = None,
    interpret: bool = False,
) -> jax.Array:
    # Imported here, as the import of Pallas takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if spec.window is not None:
        mask = splash_mask.LocalMask((T, S), (spec.window - 1, 0 if spec.causal else S), offset=0)
    else:
        mask = splash_mask.CausalMask((T, S)) if spec.causal else splash_mask.FullMask((T, S))
    bq, bk = splash_block(T), splash_block(S)
    # The query heads of one key/value head; `vmap` adds key/value heads and the batch. There is one shard, as this runs
    # on each device in a `shard_map`.
    kernel = splash.make_splash_mqa(
        splash_mask.MultiHeadMask([mask] * (H // G)),
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk
        ),
        attn_logits_soft_cap=spec.softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION_RESIDUALS,
        interpret=interpret,
    )
    q_BGRTK = (q_BTHK * spec.qk_scale(K)).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).astype(q_BTHK.dtype)
    k_BGSK, v_BGSV = k_BSGK.transpose(0, 2, 1, 3), v_BSGV.transpose(0, 2, 1, 3)
    ids = None if segments is None else splash.SegmentIds(q=segments[0], kv=segments[1])
    over_kv_heads = jax.vmap(cast(Callable[..., jax.Array], kernel), in_axes=(0, 0, 0, None))
    out_BGRTV = jax.vmap(over_kv_heads)(q_BGRTK, k_BGSK, v_BGSV, ids)
    return out_BGRTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, v_BSGV.shape[-1])


def _unsupported_by_splash(spec: AttentionSpec, inputs: KernelInputs) -> str | None:
    if inputs.explicit_positions:
        return "it takes no explicit positions"
    if not splash_block(inputs.q_len) or not splash_block(inputs.kv_len):
        return f"its lengths must be multiples of 128, not {inputs.q_len} and {inputs.kv_len}"
    for dim in (inputs.head_dim, inputs.value_dim):
        if dim % 64:
            return f"its head_dim must be a multiple of 64, not {dim}"
    return None


class Implementation(NamedTuple):
    """A kernel, and a function that returns why it cannot run (for an error message), or None if it can."""

    attend: Callable[..., jax.Array]
    unsupported: Callable[[AttentionSpec, KernelInputs], str | None]


KERNELS: dict[Kernel, Implementation] = {
    "reference": Implementation(reference, lambda spec, inputs: None),
    "xla": Implementation(partial(_jax_nn_attention, implementation="xla"), _unsupported_by_xla),
    "cudnn": Implementation(partial(_jax_nn_attention, implementation="cudnn"), _unsupported_by_cudnn),
    "splash": Implementation(_splash, _unsupported_by_splash),
}

FASTEST_FIRST: dict[str, tuple[Kernel, ...]] = {
    "tpu": ("splash", "xla", "reference"),
    "gpu": ("cudnn", "xla", "reference"),
    "cpu": ("xla", "reference"),
}


def choose_kernel(spec: AttentionSpec, inputs: KernelInputs, platform: str, kernel: Kernel | None = None) -> Kernel:
    """Returns `kernel`, or the fastest one of the platform that can run; ConfigError if `kernel` cannot."""
    candidates = FASTEST_FIRST[platform]
    if kernel is None:
        return next(name for name in candidates if KERNELS[name].unsupported(spec, inputs) is None)
    reason = f"it does not run on {platform}"
    if kernel in candidates:
        reason = KERNELS[kernel].unsupported(spec, inputs)
    if reason is not None:
        raise ConfigError(
            f"model.attention_kernel={kernel}: {reason}; use model.attention_kernel=none for the fastest that can run"
        )
    return kernel


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    spec: AttentionSpec,
    *,
    platform: str,
    segments: Segments | None = None,
    positions: Positions | None = None,
    kernel: Kernel | None = None,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Computes attention with the fastest kernel that can run: `[B, T, H, V]`, sharded like `q_BTHK`.

    Batch and heads may be sharded; lengths and head dims may not.

    Args:
        q_BTHK: queries.
        k_BSGK: keys; `H` is a multiple of `G`.
        v_BSGV: values.
        spec: mask, soft cap and scale.
        platform: "cpu", "gpu" or "tpu".
        segments: document ids, for packed sequences.
        positions: None is `0..T-1` and `0..S-1`; decoding from a cache needs explicit positions.
        kernel: forces a kernel; raises ConfigError if it cannot run.
        sinks_H: a sink for each head; only the reference takes them here, for decoding. `ops.context_attention` adds
            them to the other kernels.
    """
    inputs = KernelInputs(
        q_len=q_BTHK.shape[1],
        kv_len=k_BSGK.shape[1],
        head_dim=q_BTHK.shape[-1],
        value_dim=v_BSGV.shape[-1],
        explicit_positions=positions is not None,
        dtype=q_BTHK.dtype,
    )
    name = choose_kernel(spec, inputs, platform, kernel)
    # Most kernels lack these parameters.
    given = {key: value for key, value in (("positions", positions), ("sinks_H", sinks_H)) if value is not None}

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, given: dict[str, Any]) -> jax.Array:
        return KERNELS[name].attend(q, k, v, spec, segments, **given)

    arrays = (q_BTHK, k_BSGK, v_BSGV, segments, given)
    specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)
    # JAX cannot check over which mesh axes a value varies (vma) in kernels that are not written in JAX. For the others
    # the check stays on: without it, JAX sums gradients over all unnamed axes, a copy and a wait even on one device.
    check_vma = name in ("xla", "reference")
    y_BTHV = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=check_vma)(*arrays)
    return y_BTHV if name == "splash" else checkpoint_name(y_BTHV, ATTENTION_OUT)
