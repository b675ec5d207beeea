"""Loss and every gradient are those of one device, on every mesh, in any number of microbatches."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.parallel.layout import Rules
from jaxinfra.parallel.mesh import MeshConfig
from jaxinfra.run import Run
from tests.parity.cases import DOCUMENTS, RUNS, Case, gradients, meshes, too_different

ACCUMULATE = (1, 2, 4)


@functools.cache
def on_one_device(name: str) -> dict[str, np.ndarray]:
    return gradients(Case(run=next(run for run in RUNS if run.name == name)))


def _covering() -> list[Case]:
    """Every mesh of eight devices and some smaller ones, with runs and numbers of microbatches in turn."""
    chosen = [*meshes(8), *meshes(4)[1::2], *meshes(2)[:2], *meshes(1)]
    return [Case(run=RUNS[i % 2], mesh=mesh, accumulate=ACCUMULATE[(i + 1) % 3]) for i, mesh in enumerate(chosen)]


def _complete() -> list[Case]:
    """All runs on all meshes of eight devices in all numbers of microbatches; smaller meshes in one number each."""
    large = itertools.product(RUNS, meshes(8), ACCUMULATE)
    small = itertools.product(RUNS, [*meshes(4), *meshes(2), *meshes(1)], ACCUMULATE[1:2])
    return [Case(run=run, mesh=mesh, accumulate=n) for run, mesh, n in (*large, *small)]


FAST = _covering()
SLOW = [case for case in _complete() if case not in FAST]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_gradients_are_those_of_one_device(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device(case.run.name))


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_gradients_are_those_of_one_device_in_every_combination(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device(case.run.name))


@pytest.mark.parametrize(
    "rules",
    [
        Rules(vocab=()),
        Rules(mlp=()),
        Rules(heads=(), kv_heads=()),
        Rules(embed=("fsdp",), block_sequence=()),
        Rules(sequence=("replica", "context")),
    ],
    ids=["vocab", "mlp", "heads", "block_sequence", "sequence"],
)
def test_other_rules_change_nothing(rules: Rules) -> None:
    """What is not spread over `tensor` is whole on each of its devices, and each computes all of it."""
    rules = replace(rules, batch=tuple(axis for axis in rules.batch if axis not in rules.sequence))
    case = Case(run=replace(DOCUMENTS, rules=rules), mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2)
    assert not too_different(gradients(case), on_one_device(DOCUMENTS.name))


def test_the_order_of_devices_changes_no_bit() -> None:
    cube = MeshConfig(replica=2, fsdp=2, tensor=2)
    plain = gradients(Case(run=DOCUMENTS, mesh=cube, accumulate=2))
    shuffled = gradients(Case(run=DOCUMENTS, mesh=cube, accumulate=2, shuffled=True))
    assert {path for path, one in plain.items() if not np.array_equal(one, shuffled[path])} == set()


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_no_gradient_is_near_zero(run: Run) -> None:
    """Else a relative difference would say nothing."""
    largest = {path: float(np.abs(one).max()) for path, one in on_one_device(run.name).items()}
    assert {path for path, size in largest.items() if size < 1e-3 and "z_loss" not in path} == set()
