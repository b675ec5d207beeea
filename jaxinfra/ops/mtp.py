"""The tokens that modules for multi-token prediction read and predict (DeepSeek-AI 2024, "DeepSeek-V3", section 2.2).

The module of depth k joins the hidden state of position i with the embedding of the input at `i + k`, and predicts the
target at `i + k`. Both must be of the document of position i: at each depth a document has one position less.

Shape suffixes: B batch, K depths, T length.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

MTP_INPUTS, MTP_TARGETS, MTP_WEIGHTS = "mtp_inputs", "mtp_targets", "mtp_weights"
"""Fields of a batch of which a model computes its modules: `[B, K, T]`, of depths 1 to K."""

MTP_FIELDS = (MTP_INPUTS, MTP_TARGETS, MTP_WEIGHTS)


def of_mtp(path: str) -> bool:
    """Returns whether a parameter is one of the modules, by its path."""
    return path.startswith("mtp.")


def later_tokens(batch: Mapping[str, jax.Array], depths: int) -> dict[str, jax.Array]:
    """Returns the fields for `depths` modules, of a batch whose sequences are in their natural order.

    The weight of a target is its own, and 0 if it is of another document, or beyond the end of the sequence.
    """
    inputs_BT, targets_BT = batch["inputs"], batch["targets"]
    weights_BT = batch.get("weights", jnp.ones_like(targets_BT, jnp.float32))
    segments_BT = batch.get("segments", jnp.ones_like(inputs_BT))

    def shifted(x_BT: jax.Array) -> jax.Array:
        rows, sequence = jax.typeof(x_BT).sharding.spec.partitions
        x_BT = jax.reshard(x_BT, P(rows, None))  # a token may come from another shard of the sequence
        end_BT = jnp.zeros_like(x_BT)
        later = [jnp.concatenate([x_BT[:, k:], end_BT[:, :k]], axis=1) for k in range(1, depths + 1)]
        return jax.reshard(jnp.stack(later, axis=1), P(rows, None, sequence))

    is_same_BKT = shifted(segments_BT) == segments_BT[:, None]
    return {
        MTP_INPUTS: shifted(inputs_BT),
        MTP_TARGETS: shifted(targets_BT),
        MTP_WEIGHTS: jnp.where(is_same_BKT, shifted(weights_BT), 0.0),
    }
