"""Norms against float64, and in bfloat16."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.ops.norm import layer_norm, rms_norm

RNG = np.random.default_rng(0)
# A mean far from zero: where a variance by the difference of squares would lose its digits.
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
    found = rms_norm(jnp.asarray(X), jnp.asarray(SCALE), eps=EPS, offset=offset)
    np.testing.assert_allclose(found, rms_by_definition(offset), rtol=1e-6, atol=1e-6)


def test_layer_norm() -> None:
    """To 1e-4: the inputs themselves have 1e-5 of their deviation as rounding."""
    found = layer_norm(jnp.asarray(X), jnp.asarray(SCALE), jnp.asarray(BIAS), eps=EPS)
    np.testing.assert_allclose(found, layer_by_definition(), rtol=0, atol=1e-4)


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    half = jnp.asarray(X, jnp.bfloat16)
    scale = jnp.asarray(SCALE, jnp.bfloat16)
    found = rms_norm(half, scale, eps=EPS)
    exact = rms_norm(half.astype(jnp.float32), scale.astype(jnp.float32), eps=EPS)
    assert found.dtype == jnp.bfloat16
    assert jnp.array_equal(found, exact.astype(jnp.bfloat16))
