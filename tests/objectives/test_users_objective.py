"""Objectives from outside the package: on meshes, beside pipeline stages, and wrong in every way."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.objectives.causal_lm import CausalLM
from jaxinfra.objectives.objective import Objective
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.run import Run
from tests.models.harness import relative_error
from tests.parity.cases import DOCUMENTS, Case, batch_on_host, put_like, values_on_host

MESHES = [MeshConfig(fsdp=2), MeshConfig(replica=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, context=2)]


@dataclass(frozen=True, kw_only=True)
class Scaled(CausalLM):
    """A multiple of a loss of the package."""

    factor: float = 1.1

    @override
    def loss(self, apply: Any, params: Any, batch: Any) -> Any:
        total, sums = super().loss(apply, params, batch)
        return total * self.factor, sums


@dataclass(frozen=True, kw_only=True)
class FromLogits(Objective):
    """Cross-entropy written as in any tutorial, from all logits."""

    def loss(self, apply: Any, params: Any, batch: Any) -> Any:
        log_probs = jax.nn.log_softmax(apply(params, batch).materialize())
        hit = jax.nn.one_hot(batch["targets"], log_probs.shape[-1])
        losses = -jnp.sum(log_probs * hit, axis=-1) * batch["weights"]
        return jnp.sum(losses), {"weight": jnp.sum(batch["weights"])}


@dataclass(frozen=True, kw_only=True)
class Twice(Objective):
    def loss(self, apply: Any, params: Any, batch: Any) -> Any:
        first, second = (CausalLM().loss(apply, params, batch) for _ in range(2))
        return first[0] + second[0], first[1]


def gradients(objective: Objective, mesh: MeshConfig, run: Run = DOCUMENTS, accumulate: int = 1) -> Any:
    program = Case(run=replace(run, objective=objective), mesh=mesh, accumulate=accumulate).program()
    with program.on_mesh, jax.default_matmul_precision("highest"):
        batch = put_like(batch_on_host(run), program.validation_batch)
        params = put_like(values_on_host(program.specs), program.params)
        return jax.tree.map(np.asarray, program.gradients(params, batch)[:2])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_multiple_of_a_loss_has_that_multiple_of_its_gradient(mesh: MeshConfig) -> None:
    plain, scaled = gradients(CausalLM(), MeshConfig(fsdp=1)), gradients(Scaled(factor=1.5), mesh, accumulate=2)
    for one, other in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(scaled[0]), strict=True):
        assert relative_error(other, 1.5 * one) < 1e-5
    assert scaled[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6)


@pytest.mark.parametrize("mesh", [MESHES[1], MeshConfig(stage=2, fsdp=2)], ids=str)
def test_a_loss_from_all_logits_is_that_of_the_fused_one(mesh: MeshConfig) -> None:
    plain = gradients(CausalLM(), MeshConfig(fsdp=1))
    found = gradients(FromLogits(), mesh, accumulate=2)
    assert found[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-5)
    for one, other in zip(jax.tree.leaves(plain[0]), jax.tree.leaves(found[0]), strict=True):
        assert relative_error(other, one) < 1e-5


def test_two_passes_need_a_mesh_without_stages() -> None:
    assert gradients(Twice(), MeshConfig(fsdp=2))[1]["weight"] > 0
    with pytest.raises(ConfigError, match="objective=Twice.*mesh.stage=1"):
        gradients(Twice(), MeshConfig(stage=2, fsdp=2), accumulate=2)


@pytest.mark.parametrize(
    "loss",
    [
        lambda apply, params, batch: CausalLM().loss(apply, params, {**batch, "inputs": batch["inputs"] * 0}),
        lambda apply, params, batch: CausalLM().loss(lambda p, b: apply(p, b, train=False), params, batch),
    ],
    ids=["another batch", "without dropout"],
)
def test_stages_do_not_ignore_what_an_objective_changes(loss: Callable[..., Any]) -> None:
    assert gradients(_wrong(loss), MeshConfig(fsdp=2))[1]["weight"] > 0
    with pytest.raises(ConfigError, match="objective=Wrong.*mesh.stage=1"):
        gradients(_wrong(loss), MeshConfig(stage=2, fsdp=2), accumulate=2)


def test_a_loss_in_bfloat16_is_taken() -> None:
    def loss(apply: Any, params: Any, batch: Any) -> Any:
        total, sums = CausalLM().loss(apply, params, batch)
        return total.astype(jnp.bfloat16), sums

    grads, sums = gradients(_wrong(loss), MeshConfig(fsdp=2))
    assert sums["loss"].dtype == np.float32 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def _wrong(loss: Callable[..., Any]) -> Objective:
    cls = type("Wrong", (Objective,), {"loss": lambda self, *arguments: loss(*arguments), "__module__": __name__})
    return dataclass(frozen=True, kw_only=True)(cls)()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda apply, params, batch: jnp.zeros(()), "Wrong.loss returned"),
        (lambda apply, params, batch: (jnp.zeros(()), {}), 'Wrong.loss "weight"'),
        (lambda apply, params, batch: (batch["weights"], {"weight": jnp.ones(())}), "Wrong.loss the loss (32, 16)"),
        (lambda apply, params, batch: batch["rewards"], "test_users_objective.py KeyError rewards objective"),
        (lambda apply, params, batch: (jnp.ones(2) + jnp.ones(3), {}), "test_users_objective.py TypeError objective"),
    ],
    ids=["no sums", "no weight", "not added up", "no such array", "shapes that do not fit"],
)
def test_a_wrong_loss_is_one_line_that_names_it(loss: Callable[..., Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        gradients(_wrong(loss), MeshConfig(fsdp=1))
    message = str(refused.value)
    assert "\n" not in message and all(word in message for word in words.split()), message
