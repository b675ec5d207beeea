"""The sums of an evaluation are those of one device, and those of the gradients where nothing is dropped."""

from dataclasses import replace

import pytest

from jaxinfra.parallel.mesh import MeshConfig
from tests.parity.cases import BIASES, DOCUMENTS, MEAN, TIGHT, Case, evaluated, gradients, too_different

STAGED = MeshConfig(stage=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    "case",
    [
        Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=2, context=4)),
        pytest.param(Case(run=BIASES, mesh=STAGED, accumulate=4), marks=pytest.mark.slow),
        # What experts count, too: stages that have nothing to do count nothing.
        pytest.param(Case(run=TIGHT, mesh=STAGED, accumulate=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_evaluation_is_that_of_one_device(case: Case) -> None:
    assert not too_different(evaluated(case), evaluated(Case(run=case.run)))


def test_what_is_evaluated_is_what_is_trained() -> None:
    run = replace(MEAN, model=replace(MEAN.model, dropout=0.0))
    staged = Case(run=run, mesh=MeshConfig(stage=2, fsdp=2), accumulate=2)
    sums, *others = [evaluated(Case(run=run)), evaluated(staged), gradients(Case(run=run)), gradients(staged)]
    for other in others:
        found = {name.removeprefix("sum."): one for name, one in other.items() if not name.startswith("grad.")}
        assert not too_different(found, sums)
