"""Quantized training computes the same on every mesh, schedule and remat policy, from factors of the right format.

Scales and sums in whole numbers are the same everywhere. What differs is the last bit of what comes before a
rounding; once in a while that decides between two steps of the format, and the difference is one rounding more.
"""

import re
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.bench.parity import Arrays
from jaxinfra.models.remat import Remat
from jaxinfra.parallel.mesh import abstract_mesh
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize
from jaxinfra.program import Program
from jaxinfra.run import Precision, Run
from tests.parity.cases import DEEPSEEK, DOCUMENTS, Case, gradients, on_one_device, relative_differences

PRODUCTS = 7
"""With weights of a layer: query, key, value, out; gate, up, down."""


def run_of(quantize: Quantize, remat: Remat = "none", run: Run = DOCUMENTS) -> Run:
    return replace(
        run, model=replace(run.model, remat=remat), precision=Precision(compute="float32", quantize=quantize)
    )


def off(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


def assert_close(found: Arrays, run: Run) -> None:
    """The loss to 5e-5; of every gradient less than a tenth of what quantizing itself changes."""
    wanted, exact = on_one_device(run), on_one_device(replace(run, precision=DOCUMENTS.precision))
    assert found["sum.loss"] == pytest.approx(wanted["sum.loss"], rel=5e-5)
    for path, one in wanted.items():
        if path.startswith("grad."):
            assert off(found[path], one) < 0.1 * off(one, exact[path]), path


@pytest.mark.parametrize(
    "case",
    [
        Case(run=run_of("int8"), mesh=MeshConfig(replica=2, fsdp=2, tensor=2), accumulate=2),
        Case(run=run_of("fp8"), mesh=MeshConfig(fsdp=2, context=2, tensor=2)),
        Case(run=run_of("int8"), mesh=MeshConfig(stage=2, fsdp=2, tensor=2), accumulate=4),
        Case(run=run_of("fp8"), mesh=MeshConfig(fsdp=1, tensor=8)),
        Case(run=run_of("int8"), mesh=MeshConfig(fsdp=8)),
        *(
            pytest.param(Case(run=run_of(quantize, run=DEEPSEEK), mesh=mesh, accumulate=2), marks=pytest.mark.slow)
            for quantize, mesh in (
                ("int8", MeshConfig(fsdp=1, expert=2, context=2, tensor=2)),
                ("fp8", MeshConfig(stage=2, fsdp=2, expert=2)),
            )
        ),
    ],
    ids=lambda case: f"{case.run.precision.quantize}-{case}",
)
def test_the_mesh_changes_nothing_but_a_rounding(case: Case) -> None:
    assert_close(gradients(case), case.run)


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_rematerialisation_changes_nothing_but_a_rounding(remat: Remat) -> None:
    """What is computed again may be fused with other operations, and differ in its last bit."""
    assert_close(gradients(Case(run=run_of("int8", remat))), run_of("int8"))


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantizing_reaches_every_gradient(quantize: Quantize) -> None:
    changed = relative_differences(on_one_device(run_of(quantize)), on_one_device(DOCUMENTS))
    assert min(size for path, size in changed.items() if path.endswith("weight") and path.startswith("grad.")) > 1e-3


@pytest.mark.parametrize(("quantize", "kind"), [("int8", "i8"), ("fp8", "f8E4M3FN")])
def test_two_of_the_three_products_have_factors_of_the_format(quantize: Quantize, kind: str) -> None:
    """Forward and the gradient of activations, of all products with weights of layers, and of nothing else."""
    run = replace(run_of(quantize), mesh=MeshConfig(fsdp=2, tensor=2))
    text = Program(run, abstract_mesh(run.mesh), "tpu").lower().as_text()
    factors = re.findall(r"stablehlo\.dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    assert factors.count((kind, kind)) == 2 * PRODUCTS
    assert factors.count(("f32", "f32")) == len(factors) - 2 * PRODUCTS
