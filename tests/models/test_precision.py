"""Computing in bfloat16 changes logits by its rounding and no more."""

from typing import Any

import numpy as np
import pytest

from tests.models.harness import MODELS, build, random_tokens, slow_but

BFLOAT16_EPS = 2.0**-8


def distance(actual: Any, expected: Any) -> float:
    """Returns the root mean square of the difference, relative to that of the values."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(((actual - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("model", slow_but("llama", "gemma"))
def test_bfloat16_logits_are_near_float32_logits(model: str) -> None:
    """To 8 roundings, root mean square; and they are not the same, so the dtype reaches the model."""
    full, half = build(**MODELS[model]), build(dtype="bfloat16", **MODELS[model])
    values, tokens = full.values(), random_tokens()
    off = distance(half.logits(values, tokens), full.logits(values, tokens))
    assert 0.1 * BFLOAT16_EPS < off < 8 * BFLOAT16_EPS
