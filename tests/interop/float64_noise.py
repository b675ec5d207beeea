"""How far Qwen3-Next is from float64 in rows of three chunks, here and in transformers; run by hand, for some minutes.

    python -m pytest tests/interop/float64_noise.py -q -s

With larger random weights the layers amplify any rounding, that of tokens one by one, too.
"""

import jax
import numpy as np
import pytest

from tests.interop.conftest import References, make_references
from tests.interop.references import TINY
from tests.interop.test_families import logits_of
from tests.interop.torch_python import needs_torch
from tests.models import numpy_reference
from tests.models.harness import relative_error

CASES = {
    f"{name}, noise {noise}": TINY[name] | {"noise": noise, "length": 130}
    for noise in (0.1, 0.2, 0.3)
    for name in ("qwen3_next-0", "qwen3_next-1", "qwen3_next-2")
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> References:
    folder = tmp_path_factory.mktemp("noise")
    make_references(folder, CASES, {})
    return References(folder)


@needs_torch
@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_float64(models: References, name: str) -> None:
    expected, folder = models.arrays(name), models.folder / name
    logits, built, params = logits_of(folder, inputs=expected["tokens"])
    exact = numpy_reference.logits(jax.tree.map(np.asarray, params), built.config, expected["tokens"])
    here, there = relative_error(logits, exact), relative_error(expected["logits"], exact)
    print(f"\n{name}: {here:.1e} here, {there:.1e} in transformers")
    assert here < 2e-5 or "noise 0.1" not in name
