"""Classification: every sample is of one class.

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
    """Cross-entropy with the class of each sample.

    Attributes:
        label_smoothing: share of the target that is spread evenly over all classes in the loss to minimize (Szegedy et
            al. 2016, section 7); the loss that is reported is the cross-entropy with the class itself.
    """

    batch_fields: ClassVar[tuple[str, ...]] = ("labels",)
    partial_sums: ClassVar[bool] = True
    label_smoothing: DecayRate = 0.0

    @override
    def loss(self, apply: Apply, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        labels_B, logits_BC = batch["labels"], apply(params, batch)
        losses.require_logits(logits_BC, labels_B)
        logits_BC = logits_BC.astype(jnp.float32)
        weights_B = batch["weights"] if "weights" in batch else jnp.ones_like(labels_B, jnp.float32)
        log_probs_BC = jax.nn.log_softmax(logits_BC)
        hit_BC = labels_B[:, None] == jnp.arange(logits_BC.shape[-1])
        entropy_B = -jnp.sum(jnp.where(hit_BC, log_probs_BC, 0.0), axis=-1)
        correct_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        axes = axis_names(jax.typeof(labels_B).sharding.spec.partitions[0])

        def weighted_sum(values_B: jax.Array) -> jax.Array:
            return jnp.einsum("b,b->", values_B, weights_B, out_sharding=PartitionSpec(unreduced=frozenset(axes)))

        smooth_B = (1 - self.label_smoothing) * entropy_B - self.label_smoothing * jnp.mean(log_probs_BC, axis=-1)
        values = {"loss": entropy_B, "accuracy": correct_B, "weight": jnp.ones_like(entropy_B)}
        return losses.sums(apply, weighted_sum(smooth_B), jax.tree.map(weighted_sum, values))

    @override
    def scores(self, sums: Mapping[str, float], samples: Any) -> dict[str, float]:
        """Returns the loss in nats a sample, and the share of correct answers."""
        return {name: sums[name] / sums["weight"] for name in ("loss", "accuracy")}
