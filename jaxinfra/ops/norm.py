"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array | None = None, *, eps: float, offset: float = 0.0) -> jax.Array:
    """Returns `x / rms(x) * (offset + scale)` over the last dimension, for `x` `[..., D]` and `scale` `[D]`.

    `offset` is 1 if weights are stored as their difference from one (Gemma). Without a scale it returns `x / rms(x)`.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    normalized = x32 * inverse
    return (normalized if scale is None else normalized * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, eps: float) -> jax.Array:
    """Returns `(x - mean(x)) / std(x) * scale + bias` over the last dimension, for `x` `[..., D]`."""
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centered * centered, axis=-1, keepdims=True) + eps)
    return (centered * inverse * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)
