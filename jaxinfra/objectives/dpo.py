"""Direct preference optimization (Rafailov et al. 2023, "Direct preference optimization", equation 7).

Shape suffixes: B pairs, 2 answers of a pair (chosen, rejected), R = 2 * B rows of the model's batch, T positions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, override

import jax
import jax.numpy as jnp
from annotated_types import Ge, Lt

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveFloat
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Apply, Batch, Objective, Params, WithReference

SIDES = ("chosen", "rejected")
MODEL_FIELDS = ("inputs", "segments", "positions")
"""The fields that the model reads; a batch has them for both sides, as "chosen_inputs" and so on."""


@dataclass(frozen=True, kw_only=True)
class DPO(Objective):
    """Makes the chosen answer of each pair likelier than the rejected one, measured against a frozen reference.

    The reference model has the parameters that the run starts from, so `Run.init` must name another run. The metrics
    are the loss, the reward `beta * log(policy / reference)` of each answer, their difference (the margin), and how
    often the margin is positive.

    Attributes:
        beta: how strongly the policy is kept close to the reference.
        loss_type: what is made of the margin, as in TRL: "sigmoid" its logistic loss (DPO); "sigmoid_norm" the same of
            log-probabilities by token, so that long answers have no advantage (Meng et al. 2024, "SimPO", with a
            reference); "ipo" the squared distance of the margin by token from `1 / (2 * beta)`, which bounds it (Azar
            et al. 2023, "A general theoretical paradigm", equation 17).
        label_smoothing: assumed fraction of pairs with swapped labels (Mitchell 2023, "A note on DPO with noisy
            preferences").
    """

    batch_fields: ClassVar[tuple[str, ...]] = tuple(f"{side}_{name}" for side in SIDES for name in MODEL_FIELDS)
    by_position: ClassVar[bool] = True  # an answer's log-probability is a sum over positions
    uses_reference: ClassVar[bool] = True
    reference_fields: ClassVar[tuple[str, ...]] = tuple(f"{side}_reference" for side in SIDES)
    beta: PositiveFloat = 0.1
    loss_type: Literal["sigmoid", "sigmoid_norm", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0

    def problems(self) -> Iterable[Problem]:
        """Yields fields that contradict each other."""
        if self.label_smoothing and self.loss_type == "ipo":
            message = "are of the logistic loss"
            yield Problem(fields=("label_smoothing", "loss_type"), message=message, fix="use label_smoothing=0")

    @override
    def loss(
        self, apply: Apply, params: WithReference | Params, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        trained, found = with_reference_values(self, apply, params, batch)
        policy_B2 = answer_log_probs(apply, trained, batch, train=True)
        ratios_B2 = policy_B2 - jnp.stack([found[name] for name in self.reference_fields], axis=1)
        rewards_B2 = self.beta * (ratios_B2 if self.loss_type == "sigmoid" else ratios_B2 / answer_lengths(batch))
        margin_B = rewards_B2[:, 0] - rewards_B2[:, 1]
        if self.loss_type == "ipo":
            loss_B = jnp.square(margin_B / self.beta - 1 / (2 * self.beta))
        else:
            swapped = self.label_smoothing  # with this probability, the rejected answer is the better one
            loss_B = -(1 - swapped) * jax.nn.log_sigmoid(margin_B) - swapped * jax.nn.log_sigmoid(-margin_B)
        values = {
            "loss": loss_B,
            "reward_chosen": rewards_B2[:, 0],
            "reward_rejected": rewards_B2[:, 1],
            "reward_margin": margin_B,
            "reward_accuracy": (margin_B > 0).astype(jnp.float32),
            "weight": jnp.ones_like(loss_B),
        }
        return weighted_sums(values, batch)

    @override
    def reference_values(self, apply: Apply, params: Params, batch: Batch) -> dict[str, jax.Array]:
        values_B2 = answer_log_probs(apply, params, batch, train=False)
        return {name: values_B2[:, side] for side, name in enumerate(self.reference_fields)}

    @override
    def flops(self, model_flops: float) -> float:
        return len(SIDES) * model_flops


def with_reference_values(
    objective: Objective, apply: Apply, params: WithReference | Params, batch: Batch
) -> tuple[Params, Batch]:
    """Returns the trained parameters, and the reference's values by name: those of the batch, or computed here."""
    if not isinstance(params, WithReference):
        return params, batch
    return params.trained, jax.lax.stop_gradient(objective.reference_values(apply, params.reference, batch))


def weighted_sums(values: Mapping[str, jax.Array], batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the sums over the batch of "loss" and of all `values` `[B]`; padding samples have the weight 0."""
    weights_B = batch.get("weights", jnp.ones_like(values["loss"]))
    sums = {name: jnp.sum(value_B * weights_B) for name, value_B in values.items()}
    return sums["loss"], sums


def answer_lengths(batch: Batch) -> jax.Array:
    """Returns the number of tokens of both answers of each pair, at least one: float32 `[B, 2]`."""
    return jnp.stack([jnp.maximum(jnp.sum(batch[f"{side}_weights"], axis=1), 1.0) for side in SIDES], axis=1)


def answer_log_probs(
    apply: Apply, params: Params, batch: Batch, *, train: bool, sides: Sequence[str] = SIDES
) -> jax.Array:
    """Returns the log-probability of the answers of each sample, summed over their tokens: float32 `[B, sides]`."""
    log_probs_RT = answer_token_log_probs(apply, params, batch, train=train, sides=sides)
    return by_side(jnp.sum(log_probs_RT * join_sides(batch, "weights", sides), axis=1), len(sides))


def answer_token_log_probs(
    apply: Apply, params: Params, batch: Batch, *, train: bool, sides: Sequence[str] = SIDES
) -> jax.Array:
    """Returns the log-probability of each token of prompts and answers, in the rows of `join_sides`."""
    logits = apply(params, {name: join_sides(batch, name, sides) for name in MODEL_FIELDS}, train=train)
    return losses.token_log_probs(logits, join_sides(batch, "targets", sides))


def by_side(sums_R: jax.Array, sides: int = len(SIDES)) -> jax.Array:
    """Returns values of the rows of `join_sides` as `[B, sides]`."""
    spec = jax.typeof(sums_R).sharding.spec
    return sums_R.reshape(-1, sides, out_sharding=spec.update(partitions=(*spec.partitions, None)))


def join_sides(batch: Batch, name: str, sides: Sequence[str] = SIDES) -> jax.Array:
    """Returns a field of all answers, `[R, T]`, in the order chosen 0, rejected 0, chosen 1, rejected 1, ..."""
    # The rows of a sample are neighbors, so that no row leaves its device.
    arrays = [batch[f"{side}_{name}"] for side in sides]
    samples, length = arrays[0].shape
    spec = jax.typeof(arrays[0]).sharding.spec
    return jnp.stack(arrays, axis=1).reshape(len(sides) * samples, length, out_sharding=spec)
