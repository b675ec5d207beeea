"""Gradient clipping by the global norm, and averaged parameters."""

import jax
import jax.numpy as jnp

from jaxinfra.parallel.spec import PyTree


def clip_by_global_norm(
    grads: PyTree, max_norm: float | None, square_sum: jax.Array | None = None
) -> tuple[PyTree, jax.Array]:
    """Scales gradients down to a global norm of at most `max_norm`; returns them and the norm before.

    Sums in float32, whatever the gradients' dtype, and keeps that dtype. Gradients within the limit, or with
    `max_norm=None`, are returned bit for bit. Callers must test the norm: one that overflows makes gradients zero.

    `square_sum` is the sum of the squares of all elements, if it is known.
    """
    if square_sum is None:
        square_sum = sum((_square_sum(g) for g in jax.tree.leaves(grads)), start=jnp.float32(0))
    norm = jnp.sqrt(square_sum)
    if max_norm is None:
        return grads, norm
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads), norm


def _square_sum(x: jax.Array) -> jax.Array:
    """Sums the squares of all elements, one unsharded dimension first."""
    squares = jnp.square(x.astype(jnp.float32))
    unsharded = [dim for dim, mesh_axes in enumerate(jax.typeof(x).sharding.spec) if mesh_axes is None]
    if unsharded and x.ndim > 1:
        # XLA's CPU backend vectorizes a sum over one dimension, but not a sum over all elements of an array.
        squares = jnp.sum(squares, axis=unsharded[0])
    return jnp.sum(squares)


def ema_update(ema: PyTree, params: PyTree, decay: float, step: jax.Array | int) -> PyTree:
    """Moves the exponential moving average, which starts as a copy of the parameters, toward the updated parameters.

    `step` is the number of updates before this one. The decay is `min(decay, (1 + step) / (10 + step))`, as in
    TensorFlow's `ExponentialMovingAverage`, so that the initial values are soon forgotten. Computes in float32; the
    average should be float32 as well, as bfloat16 would round away the changes of a large decay.
    """
    t = jnp.asarray(step).astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        old_f32 = old.astype(jnp.float32)
        return (old_f32 + (1 - keep) * (new.astype(jnp.float32) - old_f32)).astype(old.dtype)

    return jax.tree.map(average, ema, params)
