"""Token losses for objectives to build on, from logits or from `FactoredLogits`, which are computed in chunks.

In JAX's explicit sharding, *unreduced* means that each device holds a partial sum.

Shape suffixes: B batch, T length, D hidden size, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.objectives.objective import Apply, Objective
from jaxinfra.ops.cross_entropy import (
    CrossEntropyConfig,
    chunked_token_cross_entropy,
    chunked_token_scores,
    fused_cross_entropy,
    token_losses,
)
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.parallel.sharding import local_shape

CHUNK_TOKENS = 1024
"""The logits of at most this many tokens per device exist at once: enough rows for an efficient matmul, and 0.5 GiB for
a vocabulary of 128k."""

type Sums = dict[str, jax.Array]
"""Sums over a batch by name, such as "loss" and "weight"."""


def cross_entropy(
    logits: FactoredLogits | jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    num_chunks: int | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """Sums the weighted losses of all tokens: cross-entropy and z-loss, in nats.

    Args:
        logits: `[B, T, V]`.
        targets_BT: the next token at each position, int32.
        weights_BT: weight of each token in the sums, float32.
        num_chunks: number of sequence chunks for the LM head and loss; None keeps to `CHUNK_TOKENS`.
        z_loss: weight of `log(sum(exp(logits)))**2`.

    Returns:
        `(loss + z_loss, {"loss", "z_loss", "weight"})`. From `FactoredLogits` they are partial sums: pass them
        through `reduce_partial_sums`.
    """
    if isinstance(logits, FactoredLogits):
        config = _chunked(logits, num_chunks, z_loss=z_loss)
        total, (entropy, z) = fused_cross_entropy(logits.hidden, logits.head, targets_BT, weights_BT, config)
        # `jnp.sum` has no `out_sharding`, so a product with ones makes the partial sum.
        out = PartitionSpec(unreduced=jax.typeof(total).sharding.spec.unreduced)
        weight = jnp.einsum("bt,bt->", weights_BT, jnp.ones_like(weights_BT), out_sharding=out)
        return total, {"loss": entropy, "z_loss": z, "weight": weight}
    require_logits(logits, targets_BT)
    entropy_BT, z_BT = token_losses(logits.astype(jnp.float32), targets_BT, CrossEntropyConfig(z_loss=z_loss))
    entropy, z = jnp.sum(entropy_BT * weights_BT), jnp.sum(z_BT * weights_BT)
    return entropy + z, {"loss": entropy, "z_loss": z, "weight": jnp.sum(weights_BT)}


def token_log_probs(logits: FactoredLogits | jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the log-probability of each target, float32 `[B, T]`; differentiable, one chunk of logits at a time."""
    if not isinstance(logits, FactoredLogits):
        require_logits(logits, targets_BT)
        return -token_losses(logits.astype(jnp.float32), targets_BT, CrossEntropyConfig())[0]
    return -chunked_token_cross_entropy(logits.hidden, logits.head, targets_BT, _chunked(logits))


def token_scores(logits: FactoredLogits, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each target, float32 `[B, T]`, and whether it is the likeliest, bool `[B, T]`."""
    return chunked_token_scores(logits.hidden, logits.head, targets_BT, _chunked(logits))


def _chunked(logits: FactoredLogits, num_chunks: int | None = None, *, z_loss: float = 0.0) -> CrossEntropyConfig:
    """Returns how to compute the loss in chunks of the sequence."""
    return CrossEntropyConfig(
        num_chunks=num_chunks or _default_num_chunks(logits.hidden),
        z_loss=z_loss,
        softcap=logits.softcap,
        unroll_loops=logits.unroll_loops,
    )


def require_logits(output: Any, targets: jax.Array) -> None:
    """Raises ConfigError unless the output of the model is logits `[*targets.shape, N]`."""
    shape = getattr(output, "shape", ())
    if not shape or shape[:-1] != targets.shape:
        what = f"an array of shape {shape}" if shape else type(output).__name__
        expected = ", ".join(map(str, targets.shape))
        raise ConfigError(f"the model returned {what} for {targets.shape} targets; return logits [{expected}, N]")


def reduce_partial_sums(apply: Apply, total: jax.Array, sums: Sums) -> tuple[jax.Array, Sums]:
    """All-reduces partial sums over the mesh, unless `apply.partial_sums` leaves that to the end of the step."""
    if getattr(apply, "partial_sums", False):  # a plain function in place of the model's `apply` has no such attribute
        return total, sums
    return jax.tree.map(lambda value: jax.reshard(value, PartitionSpec()), (total, sums))


def scaled(total: jax.Array, factor: float) -> jax.Array:
    """Multiplies a scalar, which may be a partial sum."""
    spec = PartitionSpec(reduced=jax.typeof(total).sharding.spec.unreduced)
    return total * jax.reshard(jnp.asarray(factor, total.dtype), spec)


def check_result(objective: Objective, result: Any) -> tuple[jax.Array, Sums]:
    """Checks the result of `Objective.loss`; adds the default of `sums["loss"]` and converts sums to float32."""
    name = type(objective).__qualname__
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        raise ConfigError(f"{name}.loss: returned {type(result).__name__}; return (sum over the batch, dict of sums)")
    total, sums = result
    if "weight" not in sums:
        raise ConfigError(f'{name}.loss: its sums have no "weight", which the loss is divided by; add one')
    for field, value in {"the loss": total, **sums}.items():
        if jnp.shape(value):
            raise ConfigError(f"{name}.loss: {field} has shape {jnp.shape(value)}; sum it to a scalar")
    if not all(isinstance(key, str) for key in sums):
        raise ConfigError(f"{name}.loss: its sums are named {list(sums)}; name them by strings")
    return jax.tree.map(lambda value: jnp.asarray(value).astype(jnp.float32), (total, {"loss": total, **sums}))


def add_aux_loss(total: jax.Array, aux: jax.Array | None) -> jax.Array:
    """Adds the layers' auxiliary loss to the loss."""
    if aux is None:
        return total
    # Partial sums can be added to each other, but not to a sum that is already reduced.
    if jax.typeof(aux).sharding.spec.unreduced == jax.typeof(total).sharding.spec.unreduced:
        return total + aux
    return jax.reshard(total, PartitionSpec()) + jax.reshard(aux, PartitionSpec())


def _default_num_chunks(hidden_BTD: jax.Array) -> int:
    """Returns the smallest number of equal chunks with at most `CHUNK_TOKENS` tokens per device.

    A device with 2 rows of 3,000 positions gets 6 chunks of 2 x 500 tokens.
    """
    rows, length, _ = local_shape(hidden_BTD)
    return next((n for n in range(1, length) if length % n == 0 and rows * length // n <= CHUNK_TOKENS), length)
