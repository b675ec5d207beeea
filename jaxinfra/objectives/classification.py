"""Classification: each sample has one label.

Shape suffixes: B batch, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.config.limits import DecayRate
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Apply, Batch, Objective
from jaxinfra.parallel.sharding import axis_names


@dataclass(frozen=True, kw_only=True)
class Classification(Objective):
    """Cross-entropy of the logits with the labels.

    Attributes:
        label_smoothing: fraction of the target probability that is spread evenly over all classes (Szegedy et al.
            2016, section 7). The reported loss is the cross-entropy without smoothing.
    """

    batch_fields: ClassVar[tuple[str, ...]] = ("labels",)
    partial_sums: ClassVar[bool] = True  # each device may return the sum over its own samples
    label_smoothing: DecayRate = 0.0  # at least 0, below 1

    @override
    def loss(self, apply: Apply, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels_B, logits_BC = batch["labels"], apply(params, batch)
        losses.require_logits(logits_BC, labels_B)
        logits_BC = logits_BC.astype(jnp.float32)
        weights_B = batch.get("weights", jnp.ones_like(labels_B, jnp.float32))
        log_probs_BC = jax.nn.log_softmax(logits_BC)
        # A comparison instead of a gather also works if classes are sharded.
        is_label_BC = labels_B[:, None] == jnp.arange(logits_BC.shape[-1])
        entropy_B = -jnp.sum(jnp.where(is_label_BC, log_probs_BC, 0.0), axis=-1)
        correct_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        batch_axes = axis_names(jax.typeof(labels_B).sharding.spec.partitions[0])  # mesh axes that shard the batch

        def weighted_sum(values_B: jax.Array) -> jax.Array:
            # A partial sum: each device adds up its own samples. `reduce_partial_sums` completes it if `apply` says so.
            out = PartitionSpec(unreduced=frozenset(batch_axes))
            return jnp.einsum("b,b->", values_B, weights_B, out_sharding=out)

        # With smoothing, each class has the target probability `smoothing / C`, and the label `1 - smoothing` more.
        smooth_B = (1 - self.label_smoothing) * entropy_B - self.label_smoothing * jnp.mean(log_probs_BC, axis=-1)
        values = {"loss": entropy_B, "accuracy": correct_B, "weight": jnp.ones_like(entropy_B)}
        return losses.reduce_partial_sums(apply, weighted_sum(smooth_B), jax.tree.map(weighted_sum, values))

    @override
    def evaluation_metrics(self, sums: Mapping[str, float], samples: Any) -> dict[str, float]:
        """Returns the loss in nats per sample, and the accuracy."""
        return {name: sums[name] / sums["weight"] for name in ("loss", "accuracy")}
