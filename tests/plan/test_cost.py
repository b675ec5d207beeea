"""The cost of a whole run, against values by hand."""

from dataclasses import replace

import pytest

from jaxinfra.machine.chips import CHIPS
from jaxinfra.plan.cost import Losses, cost_of
from jaxinfra.plan.estimate import StepPlan

PLAN = StepPlan(
    name="demo", topology="v5p:4x4x4", mesh={"fsdp": 64}, devices=64, device_kind="TPU v5", chips=64,
    samples=128, units_per_sample=8192,
    lower_s=3.0, estimate_s=3.6, upper_s=4.0, work={"matmuls": 3.0, "ICI": 1.0}, waits={"ICI": 0.6}, flops=1e17,
    peak_flops=459e12, memory_bytes=1, hbm_bytes=2, unknown_loops=(),
)  # fmt: skip
CHIP = replace(CHIPS["v5p"], watts=300.0, dollars={"on_demand": 4.0, "spot": 2.0})
TOKENS = 128 * 8192 * 1000.0  # a thousand steps, an hour


def test_an_hour_of_64_chips() -> None:
    cost = cost_of(PLAN, CHIP, TOKENS - 5, losses=None, pue=1.1)
    assert cost.steps == 1000 and cost.chip_hours == pytest.approx(64) and cost.days == pytest.approx(1 / 24)
    assert cost.dollars == pytest.approx({"on_demand": 256.0, "spot": 128.0})
    assert cost.kwh == pytest.approx(64 * 0.3 * 1.1) and cost.goodput is cost.spot_days is None


def test_what_has_no_row_has_no_number() -> None:
    cost = cost_of(PLAN, CHIPS["v5p"], TOKENS, losses=None, pue=1.1)
    assert not cost.dollars and cost.kwh is None


def test_lost_chips_cost_saves_steps_and_restarts() -> None:
    """64 chips of which one is lost every 640 hours: every ten hours."""
    losses = Losses(per_chip_hour=1 / 640, save_s=5.0, restart_s=300.0)
    goodput = losses.goodput(64)
    assert goodput == pytest.approx(1 - 5 / 600 - (300 + 300) / 36000, abs=1e-3), "a save every ten minutes"
    cost = cost_of(PLAN, CHIP, TOKENS, losses=losses, pue=1.0)
    assert cost.dollars["spot"] == pytest.approx(128 / goodput) and cost.dollars["on_demand"] == pytest.approx(256)
    assert cost.spot_days == pytest.approx(1 / 24 / goodput)
    assert Losses(per_chip_hour=10.0, save_s=60.0, restart_s=1e5).goodput(64) == 0.0


def test_a_plan_says_what_binds() -> None:
    assert PLAN.parts == {"matmuls": 3.0, "waits for ICI": 0.6} and PLAN.binds == "matmuls"
    assert PLAN.mfu == pytest.approx(1e17 / (3.6 * 459e12 * 64))
