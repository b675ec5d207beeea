"""Loss and every gradient are those of one device: on every axis, schedule and remat policy, in any microbatches."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.run import Run
from tests.parity.cases import BIASES, DOCUMENTS, RUNS, TIGHT, Case, gradients, near_zero, on_one_device, too_different
from tests.parity.cover import FAST, candidates, cover, pairs

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)
MIXED = MeshConfig(fsdp=2, expert=4)


def differs(case: Case) -> dict[str, float]:
    """What is too different from one device, which has none of the features that only a mesh has."""
    return too_different(gradients(case), on_one_device(RUNS.get(case.run.name, case.run)))


def test_every_pair_that_there_is_has_a_case() -> None:
    every, found = (set[tuple[str, str]]().union(*map(pairs, cases)) for cases in (candidates(), cover()))
    assert found == every
    assert {name for pair in every for name in pair} >= {*RUNS, *AXES}


def marked(number: int) -> tuple[pytest.MarkDecorator, ...]:
    """Three cases run with every JAX that is supported; those that bring little are slow."""
    return (pytest.mark.jax_range,) if number < 3 else (pytest.mark.slow,) if number >= FAST else ()


@pytest.mark.parametrize("case", [pytest.param(case, marks=marked(n), id=str(case)) for n, case in enumerate(cover())])
def test_gradients_are_those_of_one_device(case: Case) -> None:
    assert not differs(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(run=replace(TIGHT, rules=ShardingRules(experts=("fsdp", "expert"))), mesh=MIXED),
        Case(run=replace(TIGHT, rules=ShardingRules(experts=())), mesh=MIXED),
        # One row a microbatch: stages share its positions.
        Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=1, stage=2, context=2), accumulate=32),
        Case(run=BIASES, accumulate=4),
    ],
    ids=["experts over fsdp", "experts on every device", "a row a microbatch", "microbatches alone"],
)
def test_gradients_are_those_of_one_device_at_the_edges(case: Case) -> None:
    assert not too_different(gradients(case), on_one_device(replace(case.run, rules=ShardingRules())))


@pytest.mark.parametrize(
    "rules",
    [
        ShardingRules(vocab=()),
        ShardingRules(mlp=()),
        ShardingRules(heads=(), kv_heads=()),
        ShardingRules(embed=("fsdp",), block_sequence=()),
        ShardingRules(sequence=("replica", "context")),
    ],
    ids=["vocab", "mlp", "heads", "block_sequence", "sequence"],
)
def test_other_rules_change_nothing(rules: ShardingRules) -> None:
    """What is not spread over `tensor` is whole on each of its devices, and each computes all of it."""
    rules = replace(rules, batch=tuple(axis for axis in rules.batch if axis not in rules.sequence))
    case = Case(run=replace(DOCUMENTS, rules=rules), mesh=CUBE, accumulate=2)
    assert not too_different(gradients(case), on_one_device(DOCUMENTS))


def test_the_order_of_devices_changes_no_bit() -> None:
    plain = gradients(Case(run=DOCUMENTS, mesh=CUBE, accumulate=2))
    shuffled = gradients(Case(run=DOCUMENTS, mesh=CUBE, accumulate=2, shuffled=True))
    assert {path for path, one in plain.items() if not np.array_equal(one, shuffled[path])} == set()


@pytest.mark.parametrize("run", RUNS.values(), ids=lambda run: run.name)
def test_no_gradient_is_near_zero(run: Run) -> None:
    """Else a relative difference would say nothing."""
    assert near_zero(on_one_device(run)) == set()
