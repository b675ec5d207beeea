"""Odds ratio preference optimization (Hong et al. 2024, "ORPO: Monolithic preference optimization without reference").

Shape suffixes as in `dpo`: B pairs, 2 answers of a pair, R = 2 * B rows of the model's batch, T positions.
"""

from dataclasses import dataclass
from typing import ClassVar, override

import jax
import jax.numpy as jnp

from jaxinfra.config.limits import PositiveFloat
from jaxinfra.objectives.dpo import (
    MODEL_FIELDS,
    SIDES,
    answer_lengths,
    answer_token_log_probs,
    by_side,
    join_sides,
    weighted_sums,
)
from jaxinfra.objectives.objective import Apply, Batch, Objective, Params

_LARGEST = -1e-6  # of a mean log-probability: the odds of 1 are infinite


@dataclass(frozen=True, kw_only=True)
class ORPO(Objective):
    """Trains on the chosen answers, and makes their odds larger than those of the rejected ones; without a reference.

    The loss is the cross-entropy by token of all prompts and chosen answers of the global batch (`nll`), and `beta`
    times the mean logistic loss of the log of the odds ratio (`log_odds`). Odds are of log-probabilities by token.

    Attributes:
        beta: weight of the odds ratio; lambda in the paper.
    """

    batch_fields: ClassVar[tuple[str, ...]] = tuple(f"{side}_{name}" for side in SIDES for name in MODEL_FIELDS)
    by_position: ClassVar[bool] = True
    makes_rows: ClassVar[bool] = True
    statistics_fields: ClassVar[tuple[str, ...]] = ("pairs", "chosen_tokens")
    beta: PositiveFloat = 0.1

    @override
    def statistics(self, apply: Apply, params: Params, batch: Batch) -> dict[str, jax.Array]:
        tokens_B = jnp.sum(batch["chosen_segments"] != 0, axis=1).astype(jnp.float32)
        weights_B = batch.get("weights", jnp.ones_like(tokens_B))
        return {"pairs": jnp.sum(weights_B), "chosen_tokens": jnp.sum(tokens_B * weights_B)}

    @override
    def loss(self, apply: Apply, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_probs_RT = answer_token_log_probs(apply, params, batch, train=True)
        answers_B2 = by_side(jnp.sum(log_probs_RT * join_sides(batch, "weights"), axis=1)) / answer_lengths(batch)
        whole_B2 = by_side(jnp.sum(log_probs_RT * (join_sides(batch, "segments") != 0), axis=1))
        # The step divides by the number of pairs, so that the mean by token needs both numbers of the global batch.
        nll_B = -whole_B2[:, 0] * batch["pairs"] / jnp.maximum(batch["chosen_tokens"], 1.0)
        bounded_B2 = jnp.minimum(answers_B2, _LARGEST)
        odds_B2 = bounded_B2 - jnp.log(-jnp.expm1(bounded_B2))
        log_odds_B = odds_B2[:, 0] - odds_B2[:, 1]
        values = {
            "loss": nll_B - self.beta * jax.nn.log_sigmoid(log_odds_B),
            "nll": nll_B,
            "log_odds": log_odds_B,
            "reward_accuracy": (log_odds_B > 0).astype(jnp.float32),
            "weight": jnp.ones_like(nll_B),
        }
        return weighted_sums(values, batch)

    @override
    def flops(self, model_flops: float) -> float:
        return len(SIDES) * model_flops
