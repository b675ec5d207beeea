"""Loss and gradients equal those of one device, for every axis, schedule, remat policy and number of microbatches."""

from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.run import Run
from tests.parity.cases import (
    BIASES,
    DOCUMENTS,
    RUNS,
    TIGHT,
    Case,
    gradients,
    near_zero,
    on_one_device,
    one_device_program,
    too_different,
)
from tests.parity.conftest import Unless
from tests.parity.cover import FAST, candidates, cost, cover, pairs

CUBE = MeshConfig(replica=2, fsdp=2, tensor=2)
MIXED = MeshConfig(fsdp=2, expert=4)


def test_every_pair_of_choices_has_a_case() -> None:
    every, found = (set[tuple[str, str]]().union(*map(pairs, cases)) for cases in (candidates(), cover()))
    assert found == every
    assert {name for pair in every for name in pair} >= {*RUNS, *AXES}


def marked(number: int, case: Case) -> tuple[pytest.MarkDecorator, ...]:
    """The first case runs with every supported JAX; cases after the first `FAST` are slow."""
    return (pytest.mark.jax_range,) if number == 0 else (pytest.mark.slow(4 * cost(case)),) if number >= FAST else ()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=marked(n, case), id=str(case)) for n, case in enumerate(cover())]
)
def test_gradients_equal_one_device(case: Case, unless_proven: Unless) -> None:
    """On one device without schedule and remat."""
    run = RUNS[case.run.name]

    def check() -> None:
        assert not too_different(gradients(case), on_one_device(run))

    unless_proven(check, case.program(), one_device_program(run))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(run=replace(TIGHT, rules=ShardingRules(experts=("fsdp", "expert"))), mesh=MIXED),
        Case(run=replace(TIGHT, rules=ShardingRules(experts=())), mesh=MIXED),
        # One row a microbatch: stages shard its positions for the loss.
        Case(run=DOCUMENTS, mesh=MeshConfig(fsdp=1, stage=2, context=2), accumulate=32),
        Case(run=BIASES, accumulate=4),
    ],
    ids=["experts over fsdp", "experts on every device", "a row a microbatch", "microbatches alone"],
)
def test_gradients_of_special_cases_equal_one_device(case: Case, unless_proven: Unless) -> None:
    run = replace(case.run, rules=ShardingRules())

    def check() -> None:
        assert not too_different(gradients(case), on_one_device(run))

    unless_proven(check, case.program(), one_device_program(run))


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
def test_gradients_do_not_depend_on_sharding_rules(rules: ShardingRules, unless_proven: Unless) -> None:
    """A dimension that `tensor` does not shard is computed on each of its devices."""
    rules = replace(rules, batch=tuple(axis for axis in rules.batch if axis not in rules.sequence))
    case = Case(run=replace(DOCUMENTS, rules=rules), mesh=CUBE, accumulate=2)

    def check() -> None:
        assert not too_different(gradients(case), on_one_device(DOCUMENTS))

    unless_proven(check, case.program(), one_device_program(DOCUMENTS))


def test_gradients_do_not_depend_on_device_order(unless_proven: Unless) -> None:
    plain, shuffled = (Case(run=DOCUMENTS, mesh=CUBE, accumulate=2, shuffled=each) for each in (False, True))

    def check() -> None:
        found, other = gradients(plain), gradients(shuffled)
        assert {path for path, one in found.items() if not np.array_equal(one, other[path])} == set()

    unless_proven(check, plain.program(), shuffled.program())


@pytest.mark.parametrize("run", RUNS.values(), ids=lambda run: run.name)
def test_no_gradient_is_near_zero(run: Run, unless_proven: Unless) -> None:
    """Otherwise a relative difference would be meaningless."""

    def check() -> None:
        assert near_zero(on_one_device(run)) == set()

    unless_proven(check, one_device_program(run))
