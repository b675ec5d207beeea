"""Sequences that are spread over devices: loss and every gradient are those of one device.

Documents meet anywhere in a row, so also on the border of shards, and the window of five is within a shard or across
several. Runs have two chunks here: a shard of one sixteenth of a sequence has no more.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.ops.route import Form
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.run import Run
from tests.parity.cases import (
    BIASES,
    DOCUMENTS,
    Case,
    batch_on_host,
    gradients,
    on_host,
    put,
    too_different,
    values_on_host,
)


def run(base: Run, form: Form = "ring", dropout: float = 0.0) -> Run:
    model = replace(base.model, context_attention=form, dropout=dropout)
    return replace(base, model=model, task=replace(base.task, loss_chunks=2))


@functools.cache
def on_one_device(name: str) -> dict[str, np.ndarray]:
    return gradients(Case(run=next(one for one in (DOCUMENTS, BIASES) if one.name == name)))


FAST = [
    Case(run=run(DOCUMENTS), mesh=MeshConfig(fsdp=1, context=8)),
    Case(run=run(DOCUMENTS, "gather"), mesh=MeshConfig(fsdp=2, context=2, tensor=2), accumulate=2, shuffled=True),
    Case(run=run(BIASES), mesh=MeshConfig(replica=2, fsdp=1, context=2, tensor=2), accumulate=2),
    Case(run=run(DOCUMENTS), mesh=MeshConfig(fsdp=1, stage=2, context=2, tensor=2), accumulate=2),
]
SLOW = [
    Case(run=run(base, form), mesh=mesh, accumulate=accumulate)
    for base in (DOCUMENTS, BIASES)
    for mesh, form, accumulate in (
        (MeshConfig(fsdp=1, context=2), "gather", 1),
        (MeshConfig(fsdp=1, context=4), "ring", 2),
        (MeshConfig(fsdp=1, context=8), "gather", 1),
        (MeshConfig(fsdp=2, context=4), "gather", 4),
        (MeshConfig(fsdp=4, context=2), "ring", 1),
        (MeshConfig(fsdp=1, context=4, tensor=2), "ring", 1),
        (MeshConfig(fsdp=1, context=2, tensor=4), "gather", 2),
        (MeshConfig(replica=2, fsdp=2, context=2), "ring", 4),
        (MeshConfig(replica=4, fsdp=1, context=2), "gather", 2),
        (MeshConfig(fsdp=2, stage=2, context=2), "ring", 4),
        (MeshConfig(fsdp=1, stage=2, context=4), "gather", 2),
        (MeshConfig(fsdp=1, stage=2, context=2), "ring", 32),  # one row a microbatch: stages share its positions
        (MeshConfig(fsdp=1, stage=2, context=2, tensor=2), "gather", 4),
    )
]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_gradients_are_those_of_one_device(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device(case.run.name))


def test_evaluation_counts_every_token_once() -> None:
    def sums(mesh: MeshConfig) -> dict[str, np.ndarray]:
        case = Case(run=run(DOCUMENTS), mesh=mesh)
        program = case.program()
        params = put(values_on_host(program.specs), program.params)
        with program.on_mesh:
            return on_host(program.eval_step(params, put(batch_on_host(case.run), program.batch)))

    assert not too_different(sums(MeshConfig(fsdp=2, context=4)), sums(MeshConfig(fsdp=1)))


def test_a_token_drops_the_same_wherever_it_stands() -> None:
    def found(mesh: MeshConfig) -> dict[str, np.ndarray]:
        case = Case(run=run(BIASES, dropout=0.2), mesh=mesh)
        program = case.program()
        params = put(values_on_host(program.specs), program.params)
        with program.on_mesh:
            batch = program.with_words(put(batch_on_host(case.run), program.batch), 3)
            return on_host(program.gradients(params, batch))

    assert not too_different(found(MeshConfig(fsdp=1, context=4)), found(MeshConfig(fsdp=1)))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_gradients_are_those_of_one_device_in_every_combination(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device(case.run.name))
