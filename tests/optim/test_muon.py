import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.muon import assign_shards, newton_schulz
from jaxinfra.optim.optimizers import Muon, make_optimizer
from jaxinfra.optim.schedules import Constant


def reference(x_MN, iterations=5):
    """The same polynomial in float64, by its definition: aX + b(XX^T)X + c(XX^T)^2 X."""
    x = x_MN.astype(np.float64) / np.linalg.norm(x_MN)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


@pytest.mark.parametrize("shape", [(3, 24, 24), (3, 8, 40), (2, 2, 40, 8), (16, 16)])
def test_newton_schulz_moves_singular_values_to_one(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = np.asarray(newton_schulz(jnp.asarray(x), iterations=5))
    for at in itertools.product(*map(range, shape[:-2])):
        np.testing.assert_allclose(y[at], reference(x[at]), atol=2e-5)
    values = np.linalg.svd(y, compute_uv=False)
    well_conditioned = np.linalg.svd(x, compute_uv=False) > 0.05 * np.linalg.norm(x, axis=(-2, -1))[..., None]
    assert values.max() < 1.25 and values[well_conditioned].min() > 0.65


def test_newton_schulz_ignores_the_scale_and_keeps_zero():
    x = np.random.default_rng(1).normal(size=(6, 9)).astype(np.float32)
    small, large = (newton_schulz(jnp.asarray(x * scale), iterations=5) for scale in (1e-6, 1e6))
    np.testing.assert_allclose(small, large, atol=1e-5)
    assert not newton_schulz(jnp.zeros((2, 4, 4)), iterations=5).any()


@pytest.mark.parametrize(("nesterov", "scale"), [(True, "rms"), (False, "width")])
def test_update_of_stacked_projections(specs, draw, train, nesterov, scale):
    """Momentum, orthogonalization of each layer with its heads as columns, scaling, decoupled weight decay."""
    lr, beta, decay = 0.1, 0.95, 0.2
    rule = Muon(momentum=beta, nesterov=nesterov, scale=scale, weight_decay=decay)
    optim = OptimConfig(optimizer=rule, schedule=Constant(), peak_lr=lr)
    params, _ = train(make_optimizer(optim, steps=3, specs=specs), 3)
    for name, rows, cols in (("q", 8, 16), ("o", 16, 8)):
        factor = 0.2 * 4 if scale == "rms" else max(1, cols / rows) ** 0.5
        for layer in range(3):
            w, *grads = (draw(seed)["blocks"][name][layer].reshape(rows, cols) for seed in range(4))
            m = np.zeros_like(w)
            for g in grads:
                m = beta * m + (1 - beta) * g
                direction = beta * m + (1 - beta) * g if nesterov else m
                w = w - lr * (factor * reference(direction) + decay * w)
            np.testing.assert_allclose(params["blocks"][name][layer].reshape(rows, cols), w, atol=2e-5)


def test_bfloat16_products_stay_close(specs, draw):
    params = draw(0)
    updates = []
    for dtype in ("float32", "bfloat16"):
        optim = OptimConfig(optimizer=Muon(matmul_dtype=dtype), schedule=Constant(), peak_lr=1.0)
        tx = make_optimizer(optim, steps=1, specs=specs)
        update, _ = tx.update(draw(1), tx.init(params), params)
        assert update["blocks"]["q"].dtype == jnp.float32
        updates.append(update["blocks"]["q"])
    np.testing.assert_allclose(*updates, atol=0.05)


SIZES = {"fsdp": 64, "tensor": 8}


@pytest.mark.parametrize(
    ("stack", "axes", "expected"),
    [
        ((32,), ("fsdp", "tensor"), (0, ("fsdp",))),
        ((61,), ("fsdp",), (0, ("fsdp",))),
        ((4,), ("fsdp", "tensor"), (0, ("tensor",))),
        ((128,), ("fsdp", "tensor"), (0, ("fsdp", "tensor"))),
        ((1,), ("fsdp", "tensor"), (0, ())),
        ((32,), (), (0, ())),
        ((32, 16), ("fsdp",), (0, ("fsdp",))),
        ((8, 128), ("fsdp", "tensor"), (1, ("fsdp", "tensor"))),
    ],
)
def test_assign_shards_leaves_the_fewest_matrices_on_a_device(stack, axes, expected):
    assert assign_shards(stack, axes, SIZES) == expected
