"""Scaled dot-product attention: one description of what may be seen, several kernels that obey it.

`See` describes a mask once: causal, window, soft cap; documents come as segment ids. Every kernel either honours
the whole description or refuses it by name: none attends across packed documents in silence. `attend` chooses
the fastest kernel that does not refuse, by platform and shape; a config may force one.

Shape suffixes: B batch, T queries, S keys, H query heads, G key/value heads, R = H / G, K width of a query and key
head, V width of a value head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import jax
import jax.numpy as jnp

from jaxinfra.errors import ConfigError

type Kernel = Literal["reference", "xla", "cudnn", "splash"]

ATTENDED = "attended"
"""The name by which rematerialisation knows what the splash kernel yields: its output and normalisers."""


@dataclass(frozen=True, kw_only=True)
class See:
    """Which keys a query sees, and how a score becomes a weight.

    Attributes:
        causal: query i sees no key after i.
        window: query i sees no key at or before `i - window`.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        scale: factor on the dot products; None is `1 / sqrt(K)`.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a kernel needs to know of its arguments to accept or refuse them."""

    queries: int
    keys: int
    head_dim: int
    value_dim: int
    indexed: bool
    dtype: jnp.dtype


def visible(see: See, q_index: jax.Array, kv_index: jax.Array, segments: tuple[jax.Array, jax.Array] | None):
    """The mask as an array, bool `[B or 1, T, S]`: True where a query sees a key.

    Args:
        see: the description.
        q_index: place of each query in its row, `[B or 1, T]`.
        kv_index: place of each key, `[B or 1, S]`.
        segments: document ids of queries `[B, T]` and keys `[B, S]`; a query sees its own document alone.
    """
    distance = q_index[:, :, None] - kv_index[:, None, :]
    seen = jnp.ones_like(distance, bool)
    if see.causal:
        seen &= distance >= 0
    if see.window is not None:
        seen &= distance < see.window
    if segments is not None:
        seen &= segments[0][:, :, None] == segments[1][:, None, :]
    return seen


def _index(x: jax.Array) -> jax.Array:
    return jnp.arange(x.shape[1])[None]


def reference(q_BTHK, k_BSGK, v_BSGV, see: See, segments=None, q_index=None, kv_index=None) -> jax.Array:
    """The definition, scores and softmax in float32. Runs anywhere; memory grows with `T * S`.

    A query that sees no key gets the mean of all values.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGRK = q_BTHK.reshape(B, T, G, H // G, K)
    scores_BGRTS = jnp.einsum("btgrk,bsgk->bgrts", q_BTGRK, k_BSGK, preferred_element_type=jnp.float32)
    scores_BGRTS *= K**-0.5 if see.scale is None else see.scale
    if see.softcap is not None:
        scores_BGRTS = see.softcap * jnp.tanh(scores_BGRTS / see.softcap)
    q_index = _index(q_BTHK) if q_index is None else q_index
    kv_index = _index(k_BSGK) if kv_index is None else kv_index
    seen_BTS = visible(see, q_index, kv_index, segments)
    scores_BGRTS = jnp.where(seen_BTS[:, None, None], scores_BGRTS, -1e30)
    weights_BGRTS = jax.nn.softmax(scores_BGRTS, axis=-1).astype(v_BSGV.dtype)
    return jnp.einsum("bgrts,bsgv->btgrv", weights_BGRTS, v_BSGV).reshape(B, T, H, v_BSGV.shape[-1])


def _jax_nn(q_BTHK, k_BSGK, v_BSGK, see: See, segments=None, *, implementation: Literal["xla", "cudnn"]) -> jax.Array:
    mask = None
    if segments is not None:
        mask = visible(See(causal=False), _index(q_BTHK), _index(k_BSGK), segments)[:, None]
    window = None if see.window is None else (see.window - 1, 0 if see.causal else k_BSGK.shape[1])
    return jax.nn.dot_product_attention(
        q_BTHK,
        k_BSGK,
        v_BSGK,
        mask=mask,
        scale=see.scale,
        is_causal=see.causal,
        local_window_size=window,
        implementation=implementation,
    )


def _refuse_xla(see: See, shape: Shape) -> str | None:
    if see.softcap is not None:
        return "it has no soft cap"
    if shape.value_dim != shape.head_dim:
        return f"its values are as wide as its keys, not {shape.value_dim} and {shape.head_dim}"
    return "it takes no explicit positions" if shape.indexed else None


def _refuse_cudnn(see: See, shape: Shape) -> str | None:
    if refused := _refuse_xla(see, shape):
        return refused
    if shape.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {jnp.dtype(shape.dtype).name}"
    if shape.head_dim % 8 or shape.head_dim > 128:
        return f"its heads are at most 128 wide and a multiple of 8, not {shape.head_dim}"
    if see.window is not None and not see.causal:
        return "its window needs a causal mask"
    return None


def splash_block(length: int, largest: int = 512) -> int:
    """The largest block of splash attention that divides `length`: a multiple of 128, at most `largest`.

    512 compiles for every TPU from v5e on at length 8192; 1024 and above overflow the scratch memory of some.
    """
    return next((block for block in range(largest, 0, -128) if length % block == 0), 0)


def _splash(q_BTHK, k_BSGK, v_BSGV, see: See, segments=None, interpret: bool = False) -> jax.Array:
    # Pallas takes a second to import: only those who use it pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, T, H, K = q_BTHK.shape
    S, G = k_BSGK.shape[1:3]
    if see.window is not None:
        right = 0 if see.causal else S
        mask = splash_mask.LocalMask((T, S), (see.window - 1, right), 0)
    else:
        mask = splash_mask.CausalMask((T, S)) if see.causal else splash_mask.FullMask((T, S))
    bq, bk = splash_block(T), splash_block(S)
    kernel = splash.make_splash_mqa(
        splash_mask.MultiHeadMask([mask] * (H // G)),
        block_sizes=splash.BlockSizes(
            block_q=bq, block_kv=bk, block_q_dkv=bq, block_kv_dkv=bk, block_q_dq=bq, block_kv_dq=bk
        ),
        attn_logits_soft_cap=see.softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    scale = K**-0.5 if see.scale is None else see.scale
    q_BGRTK = (q_BTHK * scale).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4).astype(q_BTHK.dtype)
    k_BGSK, v_BGSV = k_BSGK.transpose(0, 2, 1, 3), v_BSGV.transpose(0, 2, 1, 3)
    ids = None if segments is None else splash.SegmentIds(q=segments[0], kv=segments[1])
    by_group = jax.vmap(cast(Callable[..., jax.Array], kernel), in_axes=(0, 0, 0, None))
    out_BGRTV = jax.vmap(by_group, in_axes=(0, 0, 0, None if ids is None else 0))(q_BGRTK, k_BGSK, v_BGSV, ids)
    return out_BGRTV.transpose(0, 3, 1, 2, 4).reshape(B, T, H, v_BSGV.shape[-1])


def _refuse_splash(see: See, shape: Shape) -> str | None:
    if shape.indexed:
        return "it takes no explicit positions"
    if not splash_block(shape.queries) or not splash_block(shape.keys):
        return f"its lengths are multiples of 128, not {shape.queries} and {shape.keys}"
    width = shape.head_dim if shape.head_dim % 64 else shape.value_dim
    return f"its heads are a multiple of 64 wide, not {width}" if width % 64 else None


KERNELS: dict[str, tuple[Callable[..., jax.Array], Callable[[See, Shape], str | None]]] = {
    "reference": (reference, lambda see, shape: None),
    "xla": (partial(_jax_nn, implementation="xla"), _refuse_xla),
    "cudnn": (partial(_jax_nn, implementation="cudnn"), _refuse_cudnn),
    "splash": (_splash, _refuse_splash),
}
PREFERRED: dict[str, tuple[str, ...]] = {
    "tpu": ("splash", "xla", "reference"),
    "gpu": ("cudnn", "xla", "reference"),
    "cpu": ("xla", "reference"),
}

PLAIN = ("xla", "reference")
"""The kernels in plain JAX, which knows over which mesh axes their values vary. It cannot look into the others, and
so sums their gradients over all axes that no sharding names: a copy and a wait on CPUs, even over one device."""


def choose(see: See, shape: Shape, platform: str, forced: Kernel | None = None) -> str:
    """The kernel to use; a ConfigError where the forced one cannot honour the description, or runs elsewhere."""
    preferred = PREFERRED[platform]
    if forced is None:
        return next(name for name in preferred if KERNELS[name][1](see, shape) is None)
    reason = KERNELS[forced][1](see, shape) if forced in preferred else f"it does not run on {platform}"
    if reason is not None:
        raise ConfigError(f"model.attention={forced}: refused: {reason}; use model.attention=none to let it be chosen")
    return forced


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    see: See,
    *,
    platform: str,
    segments: tuple[jax.Array, jax.Array] | None = None,
    q_index: jax.Array | None = None,
    kv_index: jax.Array | None = None,
    forced: Kernel | None = None,
) -> jax.Array:
    """Attention by the kernel that fits: `[B, T, H, V]`, sharded like `q_BTHK`.

    Every device works on its own sequences and heads: the batch and head dimensions may be sharded, lengths and
    head width may not.

    Args:
        q_BTHK: queries.
        k_BSGK: keys; `H` is a multiple of `G`.
        v_BSGV: values.
        see: what may be seen.
        platform: "cpu", "gpu" or "tpu".
        segments: document ids of queries and keys.
        q_index: places of the queries if they are not `0..T-1` (decoding from a cache).
        kv_index: places of the keys likewise.
        forced: the kernel that the config asks for; a ConfigError where it refuses.
    """
    indexed = q_index is not None or kv_index is not None
    shape = Shape(
        queries=q_BTHK.shape[1],
        keys=k_BSGK.shape[1],
        head_dim=q_BTHK.shape[-1],
        value_dim=v_BSGV.shape[-1],
        indexed=indexed,
        dtype=q_BTHK.dtype,
    )
    name = choose(see, shape, platform, forced)
    kernel = KERNELS[name][0]
    extra = {"segments": segments} | ({"q_index": q_index, "kv_index": kv_index} if indexed else {})

    def local(q, k, v, extra):
        return kernel(q, k, v, see, **extra)

    q, kv, extra_specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, (q_BTHK, k_BSGK, extra))
    sharded = jax.shard_map(local, in_specs=(q, kv, kv, extra_specs), out_specs=q, check_vma=name in PLAIN)
    return sharded(q_BTHK, k_BSGK, v_BSGV, extra)


splash_interpreted = partial(_splash, interpret=True)
"""The splash kernel, interpreted: the numbers that a TPU would give, on any machine, slowly."""
