"""Of a vision transformer, too, loss and gradients are those of one device: on every axis and schedule."""

import functools
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.data.image_data import ImageData
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.run import Run
from jaxinfra.tasks.classification import Classification
from tests.parity.cases import DOCUMENTS, ROWS, Case, on_host, put, too_different, values_on_host

SHAPE = VisionTransformerConfig(image_size=8, patch=2, channels=1, classes=5, layers=3, width=32, heads=8, mlp_dim=64)
TOKEN = replace(
    DOCUMENTS, name="token", model=SHAPE, task=Classification(), data=ImageData(store="none", image_size=8, channels=1)
)
"""A class token makes 17 positions, which no mesh divides; three layers are uneven over two stages."""

MEAN = replace(
    TOKEN,
    name="mean",
    model=replace(SHAPE, pool="mean", layers=4, dropout=0.2),
    task=Classification(label_smoothing=0.2),
)
"""Sixteen positions, spread over tensor between the layers; dropout and smoothing."""

RUNS = {run.name: run for run in (TOKEN, MEAN)}
STEP = 3
IDLE = "[0]['blocks']['attention']['key']['bias']"
"""A bias on keys adds the same to all scores of a query, so it has no effect and no gradient."""


def batch_on_host() -> dict[str, np.ndarray]:
    """Random images and labels; a third of the weights is zero."""
    draw = np.random.default_rng(0)
    return {
        "images": draw.normal(size=(ROWS, 8, 8, 1)).astype(np.float32),
        "labels": draw.integers(0, SHAPE.classes, ROWS, dtype=np.int32),
        "weights": (draw.random(ROWS) > 1 / 3).astype(np.float32),
    }


def gradients(case: Case) -> dict[str, np.ndarray]:
    """Every gradient but the idle one, and every sum of the loss."""
    program = case.program()
    params = put(values_on_host(program.specs), program.params)
    with program.on_mesh:
        batch = program.with_words(put(batch_on_host(), program.heldout_batch), STEP)
        found = on_host(program.gradients(params, batch))
    assert np.abs(found.pop(IDLE)).max() < 1e-6
    return found


@functools.cache
def on_one_device(name: str) -> dict[str, np.ndarray]:
    return gradients(Case(run=RUNS[name]))


def pipelined(run: Run, pipeline: PipelineConfig) -> Run:
    return replace(run, pipeline=pipeline)


CASES = {
    "cube of a token": Case(run=TOKEN, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
    "cube of a mean": Case(run=MEAN, mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
    "fsdp": Case(run=TOKEN, mesh=MeshConfig(fsdp=8)),
    "tensor of a token": Case(run=TOKEN, mesh=MeshConfig(fsdp=1, tensor=8)),
    "tensor of a mean": Case(run=MEAN, mesh=MeshConfig(fsdp=1, tensor=8)),
    "shuffled": Case(run=MEAN, mesh=MeshConfig(fsdp=4, tensor=2), shuffled=True),
    "uneven stages": Case(
        run=pipelined(TOKEN, PipelineConfig(schedule="1f1b")),
        mesh=MeshConfig(stage=2, fsdp=2, tensor=2),
        accumulate=4,
    ),
    "chunks of stages": Case(
        run=pipelined(MEAN, PipelineConfig(schedule="interleaved", chunks=2)),
        mesh=MeshConfig(replica=2, stage=2, fsdp=1, tensor=2),
        accumulate=4,
    ),
}
FAST = ("cube of a token", "tensor of a mean", "uneven stages")


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_gradients_are_those_of_one_device(name: str) -> None:
    assert not too_different(gradients(CASES[name]), on_one_device(CASES[name].run.name))


@pytest.mark.parametrize("name", RUNS)
def test_no_gradient_is_near_zero(name: str) -> None:
    """Else a relative difference would say nothing."""
    largest = {path: float(np.abs(one).max()) for path, one in on_one_device(name).items()}
    assert {path for path, size in largest.items() if size < 1e-3} == set()


def test_what_is_evaluated_is_what_is_trained() -> None:
    """The sums of evaluation, in stages as well, are those of the gradients without dropout."""
    plain = replace(MEAN, model=replace(MEAN.model, dropout=0.0))
    found = []
    for mesh, accumulate in ((MeshConfig(fsdp=1), 1), (MeshConfig(stage=2, fsdp=2), 2)):
        program = Case(run=plain, mesh=mesh, accumulate=accumulate).program()
        params = put(values_on_host(program.specs), program.params)
        with program.on_mesh:
            batch = put(batch_on_host(), program.heldout_batch)
            found.append(on_host(program.eval_step(params, batch)))
            found.append(on_host(program.gradients(params, batch)[1]))
    assert all(not too_different(other, found[0]) for other in found[1:])
