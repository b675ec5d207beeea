"""Computing in bfloat16 moves logits and gradients by its rounding, and by no more."""

from typing import Any

import numpy as np
import pytest

from tests.models.harness import MODELS, build, tokens

BFLOAT16_EPS = 2.0**-8


def distance(found: Any, wanted: Any) -> float:
    """Root mean square of the difference over that of the values."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.sqrt(((found - wanted) ** 2).mean() / (wanted**2).mean()))


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_bfloat16_logits_are_near_those_of_float32(changes: dict[str, Any]) -> None:
    """To 8 roundings, root mean square; and they are not the same, so the dtype reaches the model."""
    full, half = build(**changes), build(dtype="bfloat16", **changes)
    values, words = full.values(), tokens()
    off = distance(half.logits(values, words), full.logits(values, words))
    assert 0.1 * BFLOAT16_EPS < off < 8 * BFLOAT16_EPS
