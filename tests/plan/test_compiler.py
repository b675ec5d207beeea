"""Sets of compiler options: the real compilers take them, and a step is compiled with them."""

from dataclasses import replace
from typing import get_args

import pytest

from jaxinfra.compiler import SETS, OptionSet, options
from jaxinfra.errors import ConfigError
from jaxinfra.plan.compiled import compile_step
from jaxinfra.plan.topology import parse
from tests.golden.compiled import DENSE
from tests.refusals import raises

TPU = "v6e:2x2"
SMALL = replace(
    DENSE,
    model=replace(DENSE.model, layers=2, attention="xla"),
    mesh=replace(DENSE.mesh, fsdp=4),
    train=replace(DENSE.train, global_batch=4, accumulate=1),
)


def test_every_set_is_named() -> None:
    assert set(SETS) == set(get_args(OptionSet.__value__))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, of in SETS.items() if "tpu" in of and name != "default"])
def test_the_tpu_compiler_takes_the_set(name: OptionSet) -> None:
    """The budget of Llama 3.1 8B holds what it does on another chip."""
    run = replace(SMALL, train=replace(SMALL.train, compiler=name))
    assert compile_step(run, parse(TPU)).traffic


@pytest.mark.slow
def test_a_gpu_step_is_compiled_with_the_set() -> None:
    """Two layers are a turn of the loop, so its text has twice as many collectives."""
    plain, chosen = (
        compile_step(replace(SMALL, train=replace(SMALL.train, compiler=name)), parse("h100:1x4"))
        for name in ("default", "overlap")
    )
    assert sum(row.arrays for row in chosen.traffic) > sum(row.arrays for row in plain.traffic)


def test_a_set_for_other_hardware_is_refused_in_a_line() -> None:
    with raises(ConfigError, "train.compiler=overlap: gpu, tpu; use train.compiler=large"):
        options("overlap", "tpu")
    assert options("overlap", "cpu") == {}
