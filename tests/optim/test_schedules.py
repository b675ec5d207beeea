import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinfra.optim.schedules import (
    WSD,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    lr_table,
    optax_schedule,
)
from tests.refusals import problem

PEAK = 0.02
STEPS = 100
WARM = 10

# The rate of each schedule at the last step, at `steps` and long after, as a fraction of the peak.
ENDS = {
    Constant(warmup_steps=WARM): (1.0, 1.0, 1.0),
    Linear(warmup_steps=WARM, final_fraction=0.1): (0.1 + 0.9 / 90, 0.1, 0.1),
    Cosine(warmup_steps=WARM, final_fraction=0.1): (0.1 + 0.9 * (1 + math.cos(math.pi * 89 / 90)) / 2, 0.1, 0.1),
    WSD(warmup_steps=WARM, shape="linear", final_fraction=0.1): (0.1 + 0.9 / 20, 0.1, 0.1),
    WSD(warmup_steps=WARM, shape="sqrt"): (1 - math.sqrt(19 / 20), 0.0, 0.0),
    InverseSqrt(warmup_steps=WARM): (math.sqrt(10 / 99), math.sqrt(10 / 100), math.sqrt(10 / 10_000)),
}


@pytest.mark.parametrize("config", ENDS, ids=repr)
def test_end_points(config):
    lr = optax_schedule(config, peak_lr=PEAK, steps=STEPS)
    last, end, beyond = ENDS[config]
    expected = {0: 0.0, 1: 0.1, WARM - 1: 0.9, WARM: 1.0, STEPS - 1: last, STEPS: end, 10_000: beyond}
    for step, fraction in expected.items():
        assert float(lr(step)) == pytest.approx(PEAK * fraction, rel=1e-12, abs=1e-15), step
    rates = [float(lr(step)) for step in range(STEPS)]
    assert max(rates) == PEAK and rates.index(PEAK) == WARM


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, WSD, InverseSqrt])
def test_without_warmup_step_0_has_the_peak(kind):
    assert float(optax_schedule(kind(), peak_lr=PEAK, steps=STEPS)(0)) == PEAK


@pytest.mark.parametrize("config", ENDS, ids=repr)
def test_traced_steps_give_the_same_rates(config):
    lr = optax_schedule(config, peak_lr=PEAK, steps=STEPS)
    traced = jax.jit(jax.vmap(lr))(jnp.arange(STEPS + 5, dtype=jnp.int32))
    assert traced.dtype == jnp.float32
    np.testing.assert_allclose(traced, lr(np.arange(STEPS + 5)), rtol=2e-5, atol=1e-7 * PEAK)


def test_wsd_is_stable_until_the_decay():
    lr = optax_schedule(WSD(warmup_steps=WARM, decay_fraction=0.25, shape="linear"), peak_lr=PEAK, steps=STEPS)
    assert float(lr(75)) == PEAK
    assert float(lr(76)) == pytest.approx(PEAK * 24 / 25)


def test_cosine_equals_that_of_optax():
    ours = optax_schedule(Cosine(warmup_steps=WARM, final_fraction=0.1), peak_lr=PEAK, steps=STEPS)
    theirs = optax.warmup_cosine_decay_schedule(0.0, PEAK, WARM, STEPS, end_value=0.1 * PEAK)
    for step in range(0, STEPS + 5, 7):
        assert float(ours(step)) == pytest.approx(float(theirs(step)), rel=1e-4)


@pytest.mark.parametrize("config", ENDS, ids=repr)
def test_run_of_one_step(config):
    assert math.isfinite(float(optax_schedule(config, peak_lr=PEAK, steps=1)(0)))


def test_lr_table_has_both_ends_and_the_end_of_warmup():
    rows = lr_table(Cosine(warmup_steps=7), peak_lr=PEAK, steps=STEPS)
    assert rows[0] == (0, 0.0)
    assert (7, PEAK) in rows
    assert rows[-1][0] == STEPS - 1
    assert [step for step, _ in rows] == sorted({step for step, _ in rows})
    assert lr_table(Constant(), peak_lr=PEAK, steps=1) == [(0, PEAK)]


@pytest.mark.parametrize(
    ("config", "steps", "field"),
    [
        (Cosine(warmup_steps=100), 100, "warmup_steps"),
        (Constant(warmup_steps=101), 100, "warmup_steps"),
        (WSD(warmup_steps=50, decay_fraction=0.6), 100, "decay_fraction"),
    ],
)
def test_schedules_that_do_not_fit_the_run(config, steps, field):
    (problem,) = config.problems_in_run(steps, "optim.schedule.")
    assert f"optim.schedule.{field}" in problem.fields
    assert "optim.schedule.warmup_steps=" in problem.fix


@pytest.mark.parametrize("config", [Cosine(warmup_steps=99), WSD(warmup_steps=50, decay_fraction=0.5), Constant()])
def test_schedules_that_fit_the_run(config):
    assert not list(config.problems_in_run(100, ""))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Constant(warmup_steps=-1), "warmup_steps=-1"),
        (Linear(final_fraction=1.5), "final_fraction=1.5"),
        (Cosine(final_fraction=-0.1), "final_fraction=-0.1"),
        (WSD(decay_fraction=0.0), "decay_fraction=0.0"),
    ],
)
def test_values_out_of_range_are_refused(config, named):
    problem(config, named)
