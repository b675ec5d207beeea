"""Elementwise optimizers against a few lines of NumPy in float64, over several updates."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.optim.config import OptimConfig
from jaxinfra.optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon, make_optimizer
from jaxinfra.optim.schedules import Constant, Linear
from tests.refusals import problem

LR = 0.01
UPDATES = 4


def constant(optimizer, **rest):
    return OptimConfig(optimizer=optimizer, schedule=Constant(), peak_lr=LR, **rest)


def adamw(param, grads, decay, *, b1, b2, eps):
    m = v = np.zeros_like(param)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        param = param - LR * (step + decay * param)
    return param


def lion(param, grads, decay, *, b1, b2):
    m = np.zeros_like(param)
    for g in grads:
        param = param - LR * (np.sign(b1 * m + (1 - b1) * g) + decay * param)
        m = b2 * m + (1 - b2) * g
    return param


def sgd(param, grads, decay, *, momentum, nesterov):
    m = np.zeros_like(param)
    for g in grads:
        m = g + momentum * m
        param = param - LR * ((g + momentum * m if nesterov else m) + decay * param)
    return param


def expected(rule, specs, draw, decay, **settings):
    """Runs `rule` on every parameter in float64, with weight decay by role."""

    def one(spec, param, *grads):
        own_decay = decay if spec.role in ("matrix", "embedding", "head") else 0.0
        return rule(param.astype(np.float64), [g.astype(np.float64) for g in grads], own_decay, **settings)

    drawn = [draw(seed) for seed in range(UPDATES + 1)]
    return jax.tree.map(one, specs, *drawn)


def assert_close(got, want, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, want)


def test_adamw(specs, draw, train):
    optim = constant(AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3))
    params, _ = train(make_optimizer(optim, steps=UPDATES, specs=specs), UPDATES)
    assert_close(params, expected(adamw, specs, draw, 0.3, b1=0.8, b2=0.9, eps=1e-3))


def test_lion(specs, draw, train):
    params, _ = train(make_optimizer(constant(Lion(weight_decay=0.5)), steps=UPDATES, specs=specs), UPDATES)
    assert_close(params, expected(lion, specs, draw, 0.5, b1=0.9, b2=0.99))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd(specs, draw, train, momentum, nesterov):
    rule = SGD(momentum=momentum, nesterov=nesterov, weight_decay=0.2)
    params, _ = train(make_optimizer(constant(rule), steps=UPDATES, specs=specs), UPDATES)
    assert_close(params, expected(sgd, specs, draw, 0.2, momentum=momentum, nesterov=nesterov))


def test_muon_uses_adamw_for_other_parameters(specs, draw, train):
    optim = constant(Muon(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3))
    params, state = train(make_optimizer(optim, steps=UPDATES, specs=specs), UPDATES)
    want = expected(adamw, specs, draw, 0.3, b1=0.8, b2=0.9, eps=1e-3)
    for tree in (params, want):
        del tree["blocks"]["q"], tree["blocks"]["o"], tree["prefix"]
    assert_close(params, want)
    matrices, others = (2 * 3 + 2) * 8 * 16, 2 * 16 * 8 + 3 * 8 + 3 * 16
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(leaf.size for leaf in arrays) == matrices + 2 * others


def test_weight_decay_applies_to_the_given_roles(specs, draw):
    tx = make_optimizer(constant(AdamW(weight_decay=0.5), decay_roles=("norm",)), steps=1, specs=specs)
    params = jax.tree.map(jnp.asarray, draw(0))
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(still, tx.init(params), params)
    scale = updates["blocks"].pop("scale")
    np.testing.assert_allclose(scale, -LR * 0.5 * params["blocks"]["scale"], rtol=1e-6)
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))


def test_update_t_uses_the_learning_rate_of_step_t(specs, draw):
    optim = OptimConfig(optimizer=SGD(momentum=0.0), schedule=Linear(warmup_steps=2), peak_lr=1.0)
    tx = make_optimizer(optim, steps=4, specs=specs)
    grads = jax.tree.map(jnp.ones_like, draw(0))
    state = tx.init(grads)
    taken = []
    for _ in range(5):
        updates, state = tx.update(grads, state, grads)
        taken.append(-float(updates["head"][0, 0]))
    assert taken == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_bfloat16_state_computes_in_float32(specs, draw):
    """An update of bfloat16 state equals the float32 update of the same values, rounded afterwards."""
    tx32, tx16 = (
        make_optimizer(constant(AdamW(), state_dtype=dtype), steps=9, specs=specs) for dtype in ("float32", "bfloat16")
    )
    params = jax.tree.map(jnp.asarray, draw(0))
    _, state16 = tx16.update(draw(1), tx16.init(params), params)
    state32 = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state16)
    updates16, after16 = tx16.update(draw(2), state16, params)
    updates32, after32 = tx32.update(draw(2), state32, params)
    jax.tree.map(np.testing.assert_array_equal, updates16, updates32)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), after16, after32)
    dtypes = {(leaf.ndim > 0, leaf.dtype.name) for leaf in jax.tree.leaves(after16)}
    assert dtypes == {(True, "bfloat16"), (False, "int32")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates16)} == {"float32"}


def test_bfloat16_params_keep_float32_state(specs, draw):
    tx = make_optimizer(constant(AdamW()), steps=9, specs=specs)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), draw(0))
    updates, state = tx.update(params, tx.init(params), params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((updates, state)) if leaf.ndim} == {"float32"}


@pytest.mark.parametrize(
    ("optim", "named"),
    [
        (OptimConfig(peak_lr=0.0), "peak_lr=0"),
        (OptimConfig(peak_lr=math.inf), "peak_lr="),
        (OptimConfig(clip_norm=-1.0), "clip_norm=-1"),
        (OptimConfig(ema_decay=1.0), "ema_decay=1"),
        (OptimConfig(optimizer=AdamW(b2=1.0)), "optimizer.b2=1"),
        (OptimConfig(optimizer=AdamW(eps=0.0)), "optimizer.eps=0"),
        (OptimConfig(optimizer=Lion(weight_decay=-1.0)), "optimizer.weight_decay=-1"),
        (OptimConfig(optimizer=SGD(momentum=0.0, nesterov=True)), "optimizer.nesterov=true"),
        (OptimConfig(optimizer=Muon(iterations=0)), "optimizer.iterations=0"),
        (OptimConfig(optimizer=Adafactor(min_param_rms=0.0)), "optimizer.min_param_rms=0"),
        (OptimConfig(optimizer=AdamW(b2=0.999), state_dtype="bfloat16"), "optimizer.b2=0.999: bfloat16"),
        (OptimConfig(optimizer=Adafactor(), state_dtype="bfloat16"), "state_dtype=bfloat16"),
        (OptimConfig(optimizer=Adafactor(), state_dtype="8bit"), "state_dtype='8bit'"),
    ],
    ids=repr,
)
def test_invalid_values_are_refused(optim, named):
    problem(optim, named)


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(), Lion(), SGD(), Muon()], ids=repr)
def test_defaults_are_valid(optimizer):
    validate(OptimConfig(optimizer=optimizer))
