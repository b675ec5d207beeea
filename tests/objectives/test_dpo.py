"""Preference optimization: the loss and its gradient are those of the definition, on every mesh, in a whole run too."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.data.labeled import LabeledData
from jaxinfra.data.pairs import PairData
from jaxinfra.errors import ConfigError
from jaxinfra.objectives.dpo import DPO, SIDES
from jaxinfra.objectives.kto import KTO
from jaxinfra.objectives.objective import Objective
from jaxinfra.objectives.orpo import ORPO
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.schedules import Constant
from jaxinfra.parallel.mesh import make_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run, TrainConfig
from tests.decoders import decoder
from tests.models import numpy_reference
from tests.models.harness import build, relative_error

VOCAB, PAIRS, LENGTH = 32, 8, 16
RUN = Run(
    name="dpo",
    model=decoder(vocab_size=VOCAB, num_layers=2, hidden_size=16, num_heads=4, num_kv_heads=4, head_dim=8, mlp_dim=24),
    objective=DPO(beta=0.5, label_smoothing=0.1),
    data=PairData(store="none", seq_len=LENGTH),
    init="runs/base",
    precision=Precision(compute="float32"),
    optim=OptimConfig(schedule=Constant()),
    train=TrainConfig(steps=3, global_batch=PAIRS),
)
MESHES = [
    MeshConfig(fsdp=1),
    MeshConfig(replica=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, context=2, tensor=2),
]


def batch_on_host(sides: Sequence[str] = SIDES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {}
    if "mismatched" in sides:
        batch["label"] = (np.arange(PAIRS) % 3 > 0).astype(np.float32)
    for side in sides:
        used = rng.integers(LENGTH // 2, LENGTH + 1, (PAIRS, 1))
        segments = (np.arange(LENGTH) < used).astype(np.int32)
        batch |= {
            f"{side}_inputs": rng.integers(0, VOCAB, (PAIRS, LENGTH), np.int32),
            f"{side}_targets": rng.integers(0, VOCAB, (PAIRS, LENGTH), np.int32),
            f"{side}_segments": segments,
            f"{side}_positions": np.arange(LENGTH, dtype=np.int32) * segments,
            f"{side}_weights": (segments * (np.arange(LENGTH) > 3)).astype(np.float32),
        }
    return batch


def params_on_host(seed: int) -> dict[str, Any]:
    return build(**vars(RUN.model)).values(seed)


def definition(trained: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The sums over the batch, from the logits of the NumPy decoder in float64."""
    batch, objective = batch_on_host(), RUN.objective

    def log_probs(params: dict[str, Any], side: str) -> np.ndarray:
        names = (f"{side}_{name}" for name in ("inputs", "positions", "segments"))
        logits = numpy_reference.logits(params, RUN.model, *(batch[name] for name in names))
        entropy = numpy_reference.entropies(logits, batch[f"{side}_targets"], None)
        return -(entropy * batch[f"{side}_weights"]).sum(axis=1)

    chosen, rejected = (objective.beta * (log_probs(trained, side) - log_probs(reference, side)) for side in SIDES)
    margin, wrong = chosen - rejected, objective.label_smoothing
    loss = (1 - wrong) * np.log1p(np.exp(-margin)) + wrong * np.log1p(np.exp(margin))
    return {
        "loss": loss.sum(),
        "reward_chosen": chosen.sum(),
        "reward_rejected": rejected.sum(),
        "reward_margin": margin.sum(),
        "reward_accuracy": float((margin > 0).sum()),
        "weight": float(PAIRS),
    }


def computed(run: Run) -> tuple[dict[str, Any], dict[str, float]]:
    """Gradients of the mean loss, and all sums, of the program on the run's mesh."""
    program = Program(run, make_mesh(run.mesh, jax.devices()[: int(np.prod(run.mesh.sizes))]))
    sides = run.data.sides if isinstance(run.data, PairData) else SIDES
    batch = {name: jax.device_put(a, program.batch[name].sharding) for name, a in batch_on_host(sides).items()}

    def put(params: dict[str, Any]) -> dict[str, Any]:
        return jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), params, program.params)

    with program.on_mesh, jax.default_matmul_precision("highest"):
        reference = put(params_on_host(1)) if program.keeps_reference else None
        grads, sums, _ = program.gradients(put(params_on_host(0)), batch, reference)
    return jax.tree.map(np.asarray, grads), {name: float(value) for name, value in sums.items()}


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_loss_and_rewards_are_those_of_the_definition(mesh: MeshConfig) -> None:
    _, sums = computed(replace(RUN, mesh=mesh))
    wanted = definition(params_on_host(0), params_on_host(1))
    assert sums == pytest.approx(wanted, rel=1e-5)


def test_gradient_is_the_slope_of_the_definition() -> None:
    """Along the gradient the slope is its squared norm; microbatches and other meshes have the same gradient."""
    grads, _ = computed(replace(RUN, mesh=MESHES[0]))
    trained, reference = (numpy_reference.as_float64(params_on_host(seed)) for seed in (0, 1))
    step = 1e-6
    ahead, behind = (
        definition(jax.tree.map(lambda v, g, s=sign: v + s * step * g, trained, grads), reference)["loss"] / PAIRS
        for sign in (1, -1)
    )
    norm = sum(float((g.astype(np.float64) ** 2).sum()) for g in jax.tree.leaves(grads))
    assert (ahead - behind) / (2 * step) == pytest.approx(norm, rel=1e-4)
    elsewhere = replace(RUN, mesh=MESHES[1], train=replace(RUN.train, accumulate=2))
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(computed(elsewhere)[0]), strict=True):
        assert relative_error(other, one) < 1e-5


@pytest.mark.parametrize(
    ("objective", "data", "train"),
    [
        (ORPO(), PairData(store="none", seq_len=LENGTH), TrainConfig(global_batch=PAIRS, accumulate=2)),
        (KTO(beta=0.5), LabeledData(store="none", seq_len=LENGTH), TrainConfig(global_batch=PAIRS, canonical=4)),
    ],
    ids=["orpo", "kto"],
)
def test_sums_of_the_whole_batch_are_those_of_its_parts(objective: Objective, data: DataConfig, train: Any) -> None:
    """The mean by token, or the KL estimate, is of the global batch, however it is split."""
    run = replace(RUN, objective=objective, data=data, mesh=MESHES[0])
    grads, sums = computed(run)
    found, found_sums = computed(replace(run, train=train, mesh=MeshConfig(fsdp=2)))
    assert found_sums == pytest.approx(sums, rel=1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        assert relative_error(other, one) < 1e-5


def test_cached_reference_gives_the_numbers_of_one_in_the_step() -> None:
    run = replace(RUN, mesh=MeshConfig(fsdp=2), train=replace(RUN.train, canonical=4))
    grads, sums = computed(run)
    run = replace(run, data=replace(RUN.data, cached_reference=True))
    program = Program(run, make_mesh(run.mesh, jax.devices()[:2]))
    assert program.state.reference is None
    on_host = batch_on_host()
    batch = {name: jax.device_put(a, program.batch[name].sharding) for name, a in on_host.items()}

    def put(seed: int) -> dict[str, Any]:
        values = params_on_host(seed)
        return jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), values, program.params)

    with program.on_mesh, jax.default_matmul_precision("highest"):
        values = jax.device_get(program.reference_step(put(1), batch))
        batch |= {name: jax.device_put(a, program.batch[name].sharding) for name, a in values.items()}
        found, found_sums, _ = program.gradients(put(0), batch)
    assert {name: float(value) for name, value in found_sums.items()} == pytest.approx(sums, rel=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(found), strict=True):
        assert relative_error(other, one) < 1e-6


def test_reference_takes_no_optimizer_memory() -> None:
    program = Program(replace(RUN, mesh=MESHES[0]), make_mesh(MESHES[0], jax.devices()[:1]))
    state = program.state
    assert jax.tree.structure(state.reference) == jax.tree.structure(state.params)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * count


def test_first_step_of_equal_models_loses_log_two() -> None:
    run = replace(RUN, mesh=MESHES[0])
    program = Program(run, make_mesh(run.mesh, jax.devices()[:1]))
    batch = {name: jnp.asarray(a) for name, a in batch_on_host().items()}
    with program.on_mesh:
        state, metrics = program.train_step(program.init(jax.random.key(0)), batch)
    assert float(metrics["loss"]) == pytest.approx(np.log(2), rel=1e-6)
    assert float(metrics["reward_margin"]) == pytest.approx(0, abs=1e-6)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, state.reference)
    assert any(jax.tree.leaves(changed)), "the trained parameters move, the reference does not"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init": None}, "init=none objective= use init=runs/NAME"),
        (
            {"mesh": MeshConfig(stage=2, fsdp=1), "train": TrainConfig(global_batch=8, accumulate=2)},
            "mesh.stage=2 two forward",
        ),
        ({"objective": DPO(label_smoothing=0.5)}, "objective.label_smoothing=0.5 below 0.5"),
    ],
    ids=["no reference", "stages", "half of the labels wrong"],
)
def test_what_cannot_work_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(replace(RUN, **{"mesh": MESHES[0], **changes}))
    assert all(word in str(refused.value) for word in words.split()), refused.value
