"""Losses of tokens, from logits that are or are not multiplied out, for objectives to build on.

Shape suffixes: B batch, T length, D hidden size, V vocabulary.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.objectives.objective import Apply, Objective
from jaxinfra.ops import cross_entropy as fused
from jaxinfra.ops.logits import FactoredLogits
from jaxinfra.parallel.sharding import axis_names

CHUNK_TOKENS = 1024
"""Tokens of one device whose logits exist at once: enough rows for matrix units, 0.5 GiB at a vocabulary of 128k."""

type Sums = dict[str, jax.Array]


def cross_entropy(
    logits: FactoredLogits | jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    chunks: int | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """Sums the weighted losses of all tokens: cross-entropy and z-loss, in nats.

    Args:
        logits: of each position, `[B, T, V]`.
        targets_BT: the next token, int32.
        weights_BT: how much each token counts, float32.
        chunks: parts of a sequence whose logits exist one at a time; None keeps to `CHUNK_TOKENS` a device.
        z_loss: weight of `log(sum(exp(logits)))**2`.

    Returns:
        `(loss + z_loss, {"loss", "z_loss", "weight"})`. Of factored logits they are partial sums over the mesh: pass
        them through `sums`.
    """
    if isinstance(logits, FactoredLogits):
        config = fused.CrossEntropy(chunks=chunks or _chunks(logits.hidden), z_loss=z_loss, softcap=logits.softcap)
        total, (entropy, z) = fused.cross_entropy(logits.hidden, logits.head, targets_BT, weights_BT, config)
        axes = jax.typeof(total).sharding.spec.unreduced
        weight = jnp.einsum(
            "bt,bt->", weights_BT, jnp.ones_like(weights_BT), out_sharding=PartitionSpec(unreduced=axes)
        )
        return total, {"loss": entropy, "z_loss": z, "weight": weight}
    require_logits(logits, targets_BT)
    config = fused.CrossEntropy(z_loss=z_loss)
    entropy_BT, z_BT = fused.token_losses(logits.astype(jnp.float32), targets_BT, config)
    entropy, z = jnp.sum(entropy_BT * weights_BT), jnp.sum(z_BT * weights_BT)
    return entropy + z, {"loss": entropy, "z_loss": z, "weight": jnp.sum(weights_BT)}


def token_log_probs(logits: FactoredLogits | jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Returns the log-probability of each target, float32 `[B, T]`, differentiable, in chunks like `cross_entropy`."""
    if not isinstance(logits, FactoredLogits):
        require_logits(logits, targets_BT)
        return -fused.token_losses(logits.astype(jnp.float32), targets_BT, fused.CrossEntropy())[0]
    return -fused.chunked_token_losses(
        logits.hidden,
        logits.head,
        targets_BT,
        fused.CrossEntropy(chunks=_chunks(logits.hidden), softcap=logits.softcap),
    )


def require_logits(found: Any, targets: jax.Array) -> None:
    """Raises ConfigError where a model returned anything but logits `[*targets.shape, N]`."""
    shape = getattr(found, "shape", ())
    if not shape or shape[:-1] != targets.shape:
        what = f"an array of shape {shape}" if shape else type(found).__name__
        expected = ", ".join(map(str, targets.shape))
        raise ConfigError(f"the model returned {what} for {targets.shape} targets; return logits [{expected}, N]")


def sums(apply: Apply, total: jax.Array, values: Sums) -> tuple[jax.Array, Sums]:
    """Adds partial sums up over the mesh, unless `apply.partial_sums` lets them be added up once a step."""
    if apply.partial_sums:
        return total, values
    return jax.tree.map(lambda value: jax.reshard(value, PartitionSpec()), (total, values))


def checked(objective: Objective, found: Any) -> tuple[jax.Array, Sums]:
    """Returns what a loss returned, `sums["loss"]` included; ConfigError where it is not what `Objective.loss` says."""
    name = type(objective).__qualname__
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise ConfigError(f"{name}.loss: returned {type(found).__name__}; return (sum over the batch, dict of sums)")
    total, values = found
    if "weight" not in values:
        raise ConfigError(f'{name}.loss: its sums have no "weight", which the loss is divided by; add one')
    values = {"loss": total, **values}
    for field, value in {"the loss": total, **values}.items():
        if jnp.shape(value):
            raise ConfigError(f"{name}.loss: {field} has shape {jnp.shape(value)}; add it up to a scalar")
    return total, {name: jnp.asarray(value, jnp.float32) for name, value in values.items()}


def add_aux_loss(total: jax.Array, aux: jax.Array | None) -> jax.Array:
    """Adds what the layers add to the loss; a partial sum to a whole one is made whole first."""
    if aux is None:
        return total
    if jax.typeof(aux).sharding.spec.unreduced == jax.typeof(total).sharding.spec.unreduced:
        return total + aux
    return jax.reshard(total, PartitionSpec()) + jax.reshard(aux, PartitionSpec())


def _chunks(hidden_BTD: jax.Array) -> int:
    """The fewest chunks of equal length that keep a device at `CHUNK_TOKENS` tokens or below."""
    sharding = jax.typeof(hidden_BTD).sharding
    rows, length = (
        size // math.prod(sharding.mesh.shape[axis] for axis in axis_names(part))
        for size, part in zip(hidden_BTD.shape[:2], sharding.spec.partitions, strict=False)
    )
    return next((n for n in range(1, length) if length % n == 0 and rows * length // n <= CHUNK_TOKENS), length)
