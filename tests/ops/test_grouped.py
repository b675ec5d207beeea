"""`grouped_dot` against a loop over groups in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.ops.grouped import BLOCK_ROWS, grouped_dot

K, N = 5, 7
SIZES = {
    "mixed": (3, 0, 8, 1),
    "one group": (0, 12, 0, 0),
    "no rows": (0, 0, 0, 0),
    "many blocks": (2 * BLOCK_ROWS + 1, BLOCK_ROWS, 1, BLOCK_ROWS - 1),
}


def by_definition(x: np.ndarray, w: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    y, row = np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(sizes):
        y[row : row + size] = x[row : row + size].astype(np.float64) @ w[group]
        row += size
    return y


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(sizes: tuple[int, ...], platform: str) -> None:
    """The implementation for TPUs runs on CPUs, too."""
    rng, rows = np.random.default_rng(0), sum(sizes) + 4
    x, w, dy = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, K), (4, K, N), (rows, N)))

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return grouped_dot(x, w, jnp.array(sizes, jnp.int32), platform=platform)

    y, vjp = jax.vjp(jax.jit(product), x, w)
    np.testing.assert_allclose(y, by_definition(x, w, sizes), atol=1e-5)
    dx, dw = vjp(dy)
    np.testing.assert_allclose(dx, by_definition(dy, w.transpose(0, 2, 1), sizes), atol=1e-5)
    groups = [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
    expected = [x[rows].T.astype(np.float64) @ dy[rows] for rows in groups]
    np.testing.assert_allclose(dw, expected, atol=1e-4)


def test_rows_without_a_group_become_zero() -> None:
    x = jnp.full((6, K), jnp.nan).at[:2].set(1.0)
    w = jnp.ones((2, K, N))
    y, vjp = jax.vjp(lambda w: grouped_dot(x, w, jnp.array([1, 1]), platform="cpu"), w)
    assert np.array_equal(y[2:], np.zeros((4, N)))
    assert np.isfinite(vjp(jnp.ones_like(y))[0]).all()
