"""Norms against their definitions in float64, and in bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.ops.norm import layer_norm, rms_norm

RNG = np.random.default_rng(0)
# A mean far from zero, where a variance as a difference of squares would lose its digits.
X = (RNG.normal(size=(3, 5, 64)) + 100.0).astype(np.float32)
SCALE, BIAS = (RNG.normal(size=64).astype(np.float32) for _ in range(2))
EPS = 1e-3


def rms_by_definition(offset: float) -> np.ndarray:
    x = X.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * (offset + SCALE.astype(np.float64))


def layer_by_definition() -> np.ndarray:
    x = X.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * SCALE + BIAS


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    actual = rms_norm(jnp.asarray(X), jnp.asarray(SCALE), eps=EPS, offset=offset)
    np.testing.assert_allclose(actual, rms_by_definition(offset), rtol=1e-6, atol=1e-6)


def test_layer_norm() -> None:
    """To 1e-4: rounding of the inputs alone is 1e-5 of their deviation."""
    actual = layer_norm(jnp.asarray(X), jnp.asarray(SCALE), jnp.asarray(BIAS), eps=EPS)
    np.testing.assert_allclose(actual, layer_by_definition(), rtol=0, atol=1e-4)


def test_bfloat16_results_are_rounded_once() -> None:
    half = jnp.asarray(X, jnp.bfloat16)
    scale = jnp.asarray(SCALE, jnp.bfloat16)
    actual = rms_norm(half, scale, eps=EPS)
    exact = rms_norm(half.astype(jnp.float32), scale.astype(jnp.float32), eps=EPS)
    assert actual.dtype == jnp.bfloat16
    assert jnp.array_equal(actual, exact.astype(jnp.bfloat16))
