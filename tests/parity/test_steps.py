"""Evaluation, training steps, dropout and experts give the results of one device on every mesh."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfra.parallel.mesh_config import MeshConfig
from tests.parity.cases import (
    BIASES,
    DOCUMENTS,
    DROPPING,
    MEAN,
    STEP,
    TIGHT,
    Case,
    batch_on_host,
    evaluated,
    gradients,
    on_host,
    on_one_device,
    one_device_program,
    put_like,
    too_different,
)
from tests.parity.conftest import Unless

STAGED = MeshConfig(stage=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=2, context=4)),
        pytest.param(Case(run=BIASES, mesh=STAGED, accumulate=4), marks=pytest.mark.slow),
        # Also the statistics of experts, to which idle stages must add nothing.
        pytest.param(Case(run=TIGHT, mesh=STAGED, accumulate=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_evaluation_equals_one_device(case: Case, unless_proven: Unless) -> None:
    def check() -> None:
        assert not too_different(evaluated(case), evaluated(Case(run=case.run)))

    unless_proven(check, case.program(), one_device_program(case.run), also=("eval_step",))


def test_evaluation_and_training_have_one_loss(unless_proven: Unless) -> None:
    run = replace(MEAN, model=replace(MEAN.model, dropout=0.0))
    alone, staged = Case(run=run), Case(run=run, mesh=MeshConfig(stage=2, fsdp=2), accumulate=2)

    def check() -> None:
        sums, *others = [evaluated(alone), evaluated(staged), gradients(alone), gradients(staged)]
        for other in others:
            found = {name.removeprefix("sum."): one for name, one in other.items() if not name.startswith("grad.")}
            assert not too_different(found, sums)

    unless_proven(check, alone.program(), staged.program(), also=("eval_step",))


def test_dropout_masks_depend_on_the_step(unless_proven: Unless) -> None:
    """Otherwise equal results on all meshes would be meaningless."""

    def check() -> None:
        now, later = on_one_device(DROPPING), gradients(Case(run=DROPPING), step=STEP + 1)
        for other in (later, on_one_device(BIASES)):
            assert len(too_different(now, other)) > len(now) * 0.9

    unless_proven(check, one_device_program(DROPPING), one_device_program(BIASES))


def test_evaluation_has_no_dropout(unless_proven: Unless) -> None:
    cases = [Case(run=run) for run in (replace(BIASES, model=DROPPING.model), BIASES)]

    def check() -> None:
        dropping, plain = map(evaluated, cases)
        assert dropping == plain

    unless_proven(check, *(case.program() for case in cases), also=("eval_step",))


def test_each_training_step_has_its_own_dropout_masks(unless_proven: Unless) -> None:
    """Another step changes the loss of the same batch and parameters."""
    program = Case(run=DROPPING).program()

    def check() -> None:
        losses = []
        with program.on_mesh:
            batch = put_like(batch_on_host(program.run), program.batch)
            for step in (0, 1, 0):
                state = program.init(jax.random.key(0))
                state = replace(state, step=state.step + step)
                losses.append(float(program.train_step(state, batch)[1]["loss"]))
        assert losses[0] == losses[2] != losses[1]

    unless_proven(check, program, also=("init",))


def test_experts_reach_their_capacity(unless_proven: Unless) -> None:
    """Otherwise the other tests would not cover dropped choices."""

    def check() -> None:
        sums = on_one_device(TIGHT)
        load, kept = sums["sum.expert_load"], sums["sum.expert_served"]
        assert load.shape == (2, 8) and load.sum() == 2 * 3 * 32 * 16
        assert 0.05 < 1 - kept.sum() / load.sum() < 0.5

    unless_proven(check, one_device_program(TIGHT))


def test_a_dense_model_uses_the_expert_axis_as_data_parallel(unless_proven: Unless) -> None:
    dense = Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=2, expert=2, tensor=2), accumulate=2)

    def check() -> None:
        assert not too_different(gradients(dense), on_one_device(DOCUMENTS))

    unless_proven(check, dense.program(), one_device_program(DOCUMENTS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(MeshConfig(fsdp=2, expert=4), 1), (MeshConfig(replica=2, stage=2, fsdp=1, expert=2), 4)],
    ids=["fsdp-expert", "replica-stage-expert"],
)
def test_expert_biases_do_not_depend_on_the_mesh(mesh: MeshConfig, accumulate: int, unless_proven: Unless) -> None:
    """They depend on the choices of the whole step: all microbatches, stages and replicas."""
    moved_case = Case(run=TIGHT, mesh=mesh, accumulate=accumulate)

    def biases(case: Case) -> tuple[np.ndarray, dict[str, float]]:
        program = case.program()
        with program.on_mesh:
            state = program.init(jax.random.key(0))
            for step in range(2):
                state, metrics = program.train_step(state, put_like(batch_on_host(case.run, seed=step), program.batch))
        return np.asarray(state.params["blocks"]["mlp"]["bias"]), {n: float(v) for n, v in metrics.items()}

    def check() -> None:
        wanted, wanted_metrics = biases(Case(run=TIGHT))
        moved, metrics = biases(moved_case)
        assert np.array_equal(moved, wanted) and set(np.round(np.abs(wanted) / 0.05).flat) <= {0, 1, 2}
        assert metrics == pytest.approx(wanted_metrics, rel=1e-5)

    unless_proven(check, moved_case.program(), one_device_program(TIGHT), also=("init",))


def train(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[dict[str, float]]]:
    """Returns the state before the first step and after the last, and the metrics of each step."""
    program, metrics = case.program(), []
    with program.on_mesh:
        state = program.init(jax.random.key(0))
        start = on_host(state)
        for step in range(case.run.train.steps):
            state, found = program.train_step(state, put_like(batch_on_host(case.run, seed=step), program.batch))
            metrics.append({name: float(value) for name, value in found.items()})
    return start, _roots(on_host(state)), metrics


def _roots(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces second moments by their roots: a square has twice the relative error of the gradient."""
    return {path: np.sqrt(value) if ".nu" in path else value for path, value in state.items()}


@functools.cache
def trained_on_one_device() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[dict[str, float]]]:
    return train(Case(run=DOCUMENTS))


def test_training_changes_every_parameter_and_clips(unless_proven: Unless) -> None:
    """Otherwise equal states would be meaningless."""

    def check() -> None:
        start, end, metrics = trained_on_one_device()
        still = {
            path
            for path, before in start.items()
            if path.startswith(("params.", "ema.")) and np.abs(end[path] - before).max() < 0.005 * np.abs(before).max()
        }
        assert still == set()
        assert all(row["grad_norm"] > (DOCUMENTS.optim.clip_norm or np.inf) for row in metrics)

    unless_proven(check, one_device_program(DOCUMENTS), also=("init",))


@pytest.mark.parametrize(
    "case",
    [
        Case(run=DOCUMENTS, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
        Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=8)),
        Case(run=DOCUMENTS, mesh=MeshConfig(replica=4, fsdp=1, tensor=2), accumulate=4),
    ],
    ids=str,
)
def test_three_steps_equal_one_device(case: Case, unless_proven: Unless) -> None:
    def check() -> None:
        _, wanted, wanted_metrics = trained_on_one_device()
        _, found, metrics = train(case)
        assert not too_different(found, wanted)
        for row, wanted_row in zip(metrics, wanted_metrics, strict=True):
            assert row == pytest.approx(wanted_row, rel=1e-5)

    unless_proven(check, case.program(), one_device_program(DOCUMENTS), also=("init",))
