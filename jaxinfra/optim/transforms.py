"""What every optimiser shares: clipping by the global norm, averaged weights, the dtype of stored state.

Clipping is a function of its own, not a link of the chain, because the step reports the norm that it takes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def clip_by_global_norm(grads: Any, max_norm: float | None) -> tuple[Any, jax.Array]:
    """Gradients scaled down to a global norm of at most `max_norm`, and the norm that they had.

    Sums in float32 whatever the gradients' dtype, which they keep. Gradients within the limit come back bit for bit; so
    do all with `max_norm=None`. A norm that is not finite makes gradients that are not finite: the caller decides what
    to do.
    """
    norm = jnp.sqrt(sum((_square_sum(g) for g in jax.tree.leaves(grads)), start=jnp.float32(0)))
    if max_norm is None:
        return grads, norm
    scale = max_norm / jnp.maximum(norm, max_norm)
    return jax.tree.map(lambda g: (g.astype(jnp.float32) * scale).astype(g.dtype), grads), norm


def _square_sum(x: jax.Array) -> jax.Array:
    """The sum of the squares of all elements, a whole dimension first.

    XLA's CPU back end adds up rows many at a time, but the elements of one array one after the other.
    """
    squares = jnp.square(x.astype(jnp.float32))
    whole = [dim for dim, part in enumerate(jax.typeof(x).sharding.spec) if part is None]
    return jnp.sum(jnp.sum(squares, axis=whole[0]) if whole and x.ndim > 1 else squares)


def ema_update(ema: Any, params: Any, decay: float, step: jax.Array | int) -> Any:
    """The exponential moving average of the parameters, one step on.

    The decay used is `min(decay, (1 + step) / (10 + step))`, so that the first values, which the average
    starts from, are soon forgotten. Computes in float32 and keeps the average's own dtype: float32, or a
    large decay would round every change away.

    Args:
        ema: the average before; a copy of the parameters at the start.
        params: the parameters after this step's update, of the same structure.
        decay: the limit of the decay, in [0, 1).
        step: updates made before this one: 0 at the first.
    """
    t = jnp.asarray(step).astype(jnp.float32)
    keep = jnp.minimum(decay, (1 + t) / (10 + t))

    def average(old: jax.Array, new: jax.Array) -> jax.Array:
        old_f32 = old.astype(jnp.float32)
        return (old_f32 + (1 - keep) * (new.astype(jnp.float32) - old_f32)).astype(old.dtype)

    return jax.tree.map(average, ema, params)


def store_state_as(tx: optax.GradientTransformation, dtype: jnp.dtype) -> optax.GradientTransformation:
    """`tx` with its floating-point state kept in `dtype` between steps, while it computes in float32.

    Updates come back in float32. Scalars and counters of the state are left as they are.
    """

    def cast(tree: Any, to: jnp.dtype) -> Any:
        return jax.tree.map(lambda x: x.astype(to) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    float32 = jnp.dtype("float32")

    def init(params: optax.Params) -> optax.OptState:
        return cast(tx.init(cast(params, float32)), dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(cast(updates, float32), cast(state, float32), cast(params, float32))
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
