"""Quantized training gives equal results on every mesh, schedule and remat policy, with matmuls in the right format.

Scales and integer sums are equal everywhere. The inputs of a rounding can differ in their last bit, and sometimes that
changes the rounded value by one step of the format.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.models.remat import Remat
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize
from jaxinfra.parity.meshes import Arrays
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run
from tests.parity.cases import (
    DEEPSEEK,
    DOCUMENTS,
    Case,
    gradients,
    on_one_device,
    one_device_program,
    relative_differences,
)
from tests.parity.conftest import Unless

PRODUCTS = 7
"""Matmuls with weights in a layer: query, key, value, out; gate, up, down."""


def run_of(quantize: Quantize, remat: Remat = "none", run: Run = DOCUMENTS) -> Run:
    return replace(
        run, model=replace(run.model, remat=remat), precision=Precision(compute="float32", quantize=quantize)
    )


def relative_rms(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


def references(run: Run) -> tuple[Run, Run]:
    """Returns the run, and the same without quantization."""
    return run, replace(run, precision=DOCUMENTS.precision)


def assert_close(found: Arrays, run: Run) -> None:
    """Checks the loss to 5e-5, and each gradient to a tenth of the error of quantization itself."""
    wanted, exact = map(on_one_device, references(run))
    assert found["sum.loss"] == pytest.approx(wanted["sum.loss"], rel=5e-5)
    for path, one in wanted.items():
        if path.startswith("grad."):
            assert relative_rms(found[path], one) < 0.1 * relative_rms(one, exact[path]), path


@pytest.mark.parametrize(
    "case",
    [
        Case(run=run_of("int8"), mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
        Case(run=run_of("fp8"), mesh=MeshConfig(fsdp=2, context=2, tensor=2)),
        Case(run=run_of("int8"), mesh=MeshConfig(stage=2, fsdp=2, tensor=2), accumulate=4),
        Case(run=run_of("fp8"), mesh=MeshConfig(fsdp=1, tensor=8)),
        Case(run=run_of("int8"), mesh=MeshConfig(fsdp=8)),
        *(
            pytest.param(Case(run=run_of(quantize, run=DEEPSEEK), mesh=mesh, accumulate=2), marks=pytest.mark.slow(40))
            for quantize, mesh in (
                ("int8", MeshConfig(fsdp=1, expert=2, context=2, tensor=2)),
                ("fp8", MeshConfig(stage=2, fsdp=2, expert=2)),
            )
        ),
    ],
    ids=lambda case: f"{case.run.precision.quantize}-{case}",
)
def test_results_do_not_depend_on_the_mesh(case: Case, unless_proven: Unless) -> None:
    unless_proven(
        lambda: assert_close(gradients(case), case.run), case.program(), *map(one_device_program, references(case.run))
    )


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_results_do_not_depend_on_remat(remat: Remat, unless_proven: Unless) -> None:
    """A recomputed value may be fused with other operations, and differ in its last bit."""
    case, run = Case(run=run_of("int8", remat)), run_of("int8")
    unless_proven(lambda: assert_close(gradients(case), run), case.program(), *map(one_device_program, references(run)))


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantization_changes_every_gradient(quantize: Quantize, unless_proven: Unless) -> None:
    quantized, exact = references(run_of(quantize))

    def check() -> None:
        changed = relative_differences(on_one_device(quantized), on_one_device(exact))
        weights = [path for path in changed if path.endswith("weight") and path.startswith("grad.")]
        assert min(changed[path] for path in weights) > 1e-3

    unless_proven(check, one_device_program(quantized), one_device_program(exact))


@pytest.mark.parametrize(("quantize", "kind"), [("int8", "i8"), ("fp8", "f8E4M3FN")])
def test_two_of_three_matmuls_are_quantized(quantize: Quantize, kind: str) -> None:
    """The forward matmul and the gradient of the activations, for all weights of layers, and nothing else."""
    run = replace(run_of(quantize), mesh=MeshConfig(fsdp=2, tensor=2))
    text = Program(run, abstract_mesh(run.mesh), "tpu").lower().as_text()
    factors = re.findall(r"stablehlo\.dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    assert factors.count((kind, kind)) == 2 * PRODUCTS
    assert factors.count(("f32", "f32")) == len(factors) - 2 * PRODUCTS
