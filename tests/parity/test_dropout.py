"""With dropout, too, loss and gradients are those of one device: on every mesh, schedule and remat policy."""

import functools
from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxinfra.models.remat import Remat
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.run import Run
from tests.parity.cases import BIASES, DOCUMENTS, Case, batch_on_host, on_host, put, too_different, values_on_host

STEP = 3


def with_dropout(run: Run, rate: float = 0.2) -> Run:
    return replace(run, model=replace(run.model, dropout=rate))


RUNS = {run.name: with_dropout(run) for run in (DOCUMENTS, BIASES)}


def gradients(case: Case, step: int = STEP) -> dict[str, np.ndarray]:
    """Every gradient and every sum of the loss, with the masks of a step."""
    program = case.program()
    params = put(values_on_host(program.specs), program.params)
    with program.on_mesh:
        batch = program.with_words(put(batch_on_host(case.run), program.batch), step)
        return on_host(program.gradients(params, batch))


@functools.cache
def on_one_device(name: str) -> dict[str, np.ndarray]:
    return gradients(Case(run=RUNS[name]))


def remat(run: Run, policy: Remat | tuple[Remat, ...]) -> Run:
    return replace(run, model=replace(run.model, remat=policy))


def pipelined(run: Run, pipeline: PipelineConfig, layers: int | None = None) -> Run:
    return replace(run, pipeline=pipeline, model=replace(run.model, layers=layers or run.model.layers))


CASES = {
    "microbatches": Case(run=RUNS["documents"], accumulate=4),
    "cube": Case(run=RUNS["documents"], mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
    "fsdp": Case(run=RUNS["biases"], mesh=MeshConfig(fsdp=8)),
    "shuffled": Case(run=RUNS["biases"], mesh=MeshConfig(fsdp=4, tensor=2), shuffled=True),
    "full": Case(run=remat(RUNS["documents"], "full"), mesh=MeshConfig(fsdp=2, tensor=2)),
    "dots": Case(run=remat(RUNS["biases"], "dots"), mesh=MeshConfig(fsdp=2), accumulate=2),
    "weights": Case(run=remat(RUNS["biases"], "weights"), mesh=MeshConfig(fsdp=2)),
    "stages": Case(
        run=pipelined(RUNS["documents"], PipelineConfig(schedule="1f1b")),
        mesh=MeshConfig(stage=2, fsdp=2, tensor=2),
        accumulate=4,
    ),
    "stages of a pattern": Case(
        run=pipelined(remat(RUNS["biases"], ("full", "dots")), PipelineConfig(schedule="1f1b")),
        mesh=MeshConfig(stage=2, fsdp=2),
        accumulate=2,
    ),
    "stages of several kinds": Case(
        run=pipelined(RUNS["biases"], PipelineConfig(schedule="gpipe")), mesh=MeshConfig(stage=2, fsdp=2), accumulate=2
    ),
}


FAST = ("microbatches", "cube", "full")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_gradients_are_those_of_one_device(name: str) -> None:
    assert not too_different(gradients(CASES[name]), on_one_device(CASES[name].run.name))


@pytest.mark.slow
def test_chunks_of_stages_drop_what_one_device_drops() -> None:
    run = pipelined(RUNS["documents"], PipelineConfig(schedule="interleaved", chunks=2), layers=4)
    interleaved = Case(run=run, mesh=MeshConfig(stage=2, fsdp=2), accumulate=4)
    assert not too_different(gradients(interleaved), gradients(Case(run=run)))


def test_masks_change_with_the_step_and_the_loss_with_them() -> None:
    """Else the agreement above would say nothing."""
    now, later = on_one_device("documents"), gradients(Case(run=RUNS["documents"]), step=STEP + 1)
    none = gradients(Case(run=with_dropout(RUNS["documents"], 0.0)))
    for other in (later, none):
        assert len(too_different(now, other)) > len(now) * 0.9


def test_evaluation_drops_nothing() -> None:
    dropping, plain = (Case(run=run).program() for run in (RUNS["documents"], DOCUMENTS))
    sums = []
    for program in (dropping, plain):
        params = put(values_on_host(program.specs), program.params)
        with program.on_mesh:
            sums.append(on_host(program.eval_step(params, put(batch_on_host(program.run), program.batch))))
    assert sums[0] == sums[1]


def test_each_step_of_training_has_masks_of_its_own() -> None:
    """The same batch and parameters, another step: another loss."""
    program = Case(run=RUNS["documents"]).program()
    losses = []
    with program.on_mesh:
        batch = put(batch_on_host(program.run), program.batch)
        for step in (0, 1, 0):
            state = program.init(jax.random.key(0))
            state = replace(state, step=state.step + step)
            losses.append(float(program.train_step(state, batch)[1]["loss"]))
    assert losses[0] == losses[2] != losses[1]
