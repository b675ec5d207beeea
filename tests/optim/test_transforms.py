import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.optim.transforms import clip_by_global_norm, ema_update


def test_clip_returns_the_norm_before_and_scales_to_the_limit(draw):
    grads = draw(1)
    want = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads)))
    clipped, norm = clip_by_global_norm(grads, 0.5)
    assert float(norm) == pytest.approx(want, rel=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b * 0.5 / want, rtol=1e-5), clipped, grads)


@pytest.mark.parametrize("max_norm", [None, 1e6])
def test_clip_returns_small_gradients_bit_for_bit(draw, max_norm):
    grads = draw(1)
    clipped, _ = clip_by_global_norm(grads, max_norm)
    jax.tree.map(np.testing.assert_array_equal, clipped, grads)


def test_clip_of_zero_is_zero():
    clipped, norm = clip_by_global_norm({"w": jnp.zeros(4)}, 1.0)
    assert float(norm) == 0.0 and not clipped["w"].any()


def test_clip_sums_bfloat16_in_float32():
    grads = {"w": jnp.full(4096, 1.0, jnp.bfloat16)}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert float(norm) == 64.0 and norm.dtype == jnp.float32
    assert clipped["w"].dtype == jnp.bfloat16 and float(clipped["w"][0]) == 1 / 64


def test_clip_of_nan_is_nan():
    clipped, norm = clip_by_global_norm({"w": jnp.array([1.0, jnp.nan])}, 1.0)
    assert jnp.isnan(norm) and jnp.isnan(clipped["w"]).all()


def test_ema_equals_its_definition():
    ema, rng = np.zeros(5), np.random.default_rng(0)
    got = {"w": jnp.zeros(5)}
    for step in range(40):
        param = rng.normal(size=5).astype(np.float32)
        keep = min(0.6, (1 + step) / (10 + step))
        ema = keep * ema + (1 - keep) * param
        got = jax.jit(ema_update, static_argnums=2)(got, {"w": param}, 0.6, jnp.int32(step))
    np.testing.assert_allclose(got["w"], ema, rtol=1e-5, atol=1e-7)


def test_ema_keeps_its_own_dtype():
    got = ema_update({"w": jnp.zeros(3)}, {"w": jnp.ones(3, jnp.bfloat16)}, 0.9, 0)
    assert got["w"].dtype == jnp.float32
    np.testing.assert_allclose(got["w"], 0.9)
