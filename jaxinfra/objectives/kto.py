"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, "KTO: Model alignment as prospect theoretic optimization").

Shape suffix: B completions.
"""

from dataclasses import dataclass
from typing import ClassVar, override

import jax
import jax.numpy as jnp

from jaxinfra.config.limits import PositiveFloat
from jaxinfra.objectives.dpo import MODEL_FIELDS, answer_log_probs, weighted_sums, with_reference_values
from jaxinfra.objectives.objective import Apply, Batch, Objective, Params, WithReference

SIDES = ("completion", "mismatched")


@dataclass(frozen=True, kw_only=True)
class KTO(Objective):
    """Makes desirable completions likelier and undesirable ones less likely, measured against a frozen reference.

    The loss of a completion is `1 - sigmoid(beta * (log(policy / reference) - kl))`, with the sign turned inside if it
    is undesirable (equation 8). `kl` is the mean of `log(policy / reference)` over the mismatched completions of the
    global batch, at least 0, and has no gradient. The reference is that of `DPO`.

    Attributes:
        beta: how strongly the policy is kept close to the reference.
        desirable_weight: weight of the losses of desirable completions.
        undesirable_weight: weight of the others. The authors advise a product of weight and count that is 1 to 4/3
            times larger for desirable ones than for the others.
    """

    batch_fields: ClassVar[tuple[str, ...]] = (*(f"{side}_{name}" for side in SIDES for name in MODEL_FIELDS), "label")
    by_position: ClassVar[bool] = True
    makes_rows: ClassVar[bool] = True
    uses_reference: ClassVar[bool] = True
    reference_fields: ClassVar[tuple[str, ...]] = tuple(f"{side}_reference" for side in SIDES)
    statistics_fields: ClassVar[tuple[str, ...]] = ("kl_sum", "kl_count")
    beta: PositiveFloat = 0.1
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0

    @override
    def reference_values(self, apply: Apply, params: Params, batch: Batch) -> dict[str, jax.Array]:
        # A forward pass for each side: a step without a cache needs one of them at a time.
        return {f"{side}_reference": _log_probs(apply, params, batch, side, train=False) for side in SIDES}

    @override
    def statistics(self, apply: Apply, params: WithReference | Params, batch: Batch) -> dict[str, jax.Array]:
        trained, found = with_reference_values(self, apply, params, batch)
        policy_B = _log_probs(apply, trained, batch, "mismatched", train=False)
        weights_B = batch.get("weights", jnp.ones_like(policy_B))
        log_ratios_B = policy_B - found["mismatched_reference"]
        return {"kl_sum": jnp.sum(log_ratios_B * weights_B), "kl_count": jnp.sum(weights_B)}

    @override
    def loss(
        self, apply: Apply, params: WithReference | Params, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        trained, found = with_reference_values(self, apply, params, batch)
        policy_B = _log_probs(apply, trained, batch, "completion", train=True)
        log_ratios_B, label_B = policy_B - found["completion_reference"], batch["label"]
        kl_B = jnp.maximum(batch["kl_sum"] / jnp.maximum(batch["kl_count"], 1.0), 0.0)
        gain_B = self.beta * (2 * label_B - 1) * (log_ratios_B - kl_B)
        weight_B = label_B * self.desirable_weight + (1 - label_B) * self.undesirable_weight
        values = {
            "loss": weight_B * jax.nn.sigmoid(-gain_B),
            "kl": kl_B,
            "reward_accuracy": ((2 * label_B - 1) * log_ratios_B > 0).astype(jnp.float32),
            "weight": jnp.ones_like(kl_B),
        }
        return weighted_sums(values, batch)

    @override
    def flops(self, model_flops: float) -> float:
        return model_flops * 4 / 3  # forward and backward on a completion, forward on a mismatched one


def _log_probs(apply: Apply, params: Params, batch: Batch, side: str, *, train: bool) -> jax.Array:
    """Returns the log-probability of one completion of each sample, summed over its tokens: float32 `[B]`."""
    return answer_log_probs(apply, params, batch, train=train, sides=(side,))[:, 0]
