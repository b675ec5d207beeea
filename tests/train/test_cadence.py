"""After which steps a run saves."""

import pytest

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.track.goodput import best_interval_s, expected_goodput
from jaxinfra.train.cadence import Cadence
from tests.refusals import refused
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

AUTO = CheckpointConfig(save_every="auto", chip_hours_per_loss=64.0)


def test_the_interval_loses_least() -> None:
    best_s = best_interval_s(2.0, 3600.0)

    assert best_s == pytest.approx(120.0, rel=0.02), "sqrt(2 x 2 x 3600)"
    best, shorter, longer = (expected_goodput(factor * best_s, 2.0, 60.0, 3600.0) for factor in (1.0, 0.9, 1.1))
    assert best > max(shorter, longer)


def test_the_cadence_follows_from_what_was_measured() -> None:
    cadence = Cadence(AUTO, start_step=100, devices=64)  # a loss every hour

    assert [step for step in range(101, 140) if cadence.after(step)] == [120]
    line = cadence.saved(120, stall_s=2.0, step_s=10.0)
    assert line == (
        "saves every 12 steps (120 s): a save stalls training for 2.00 s, and a loss is expected every 1 hours"
    )
    assert [step for step in range(121, 150) if cadence.after(step)] == [132]
    assert cadence.saved(132, stall_s=2.2, step_s=10.0) is None  # nearly the same
    assert [step for step in range(133, 150) if cadence.after(step)] == [144]
    assert "saves every 37 steps" in (cadence.saved(144, stall_s=20.0, step_s=10.0) or "")


def test_all_processes_take_that_of_the_first() -> None:
    cadence = Cadence(AUTO, start_step=0, devices=64, broadcast=lambda every: 7)

    cadence.saved(20, stall_s=2.0, step_s=10.0)

    assert cadence.after(27) == "checkpoint"


def test_one_device_is_lost_once_a_week() -> None:
    line = Cadence(CheckpointConfig(save_every="auto"), 0, devices=1).saved(20, stall_s=1.0, step_s=1.0)

    assert line is not None and "saves every 1,099 steps" in line and "every 168 hours" in line


def test_copies_between_checkpoints() -> None:
    cadence = Cadence(CheckpointConfig(save_every="auto", local="/dev/shm/x", local_every=8), 0, 1)

    assert {step: cadence.after(step) for step in (8, 16, 20)} == {8: "copy", 16: "copy", 20: "checkpoint"}


def test_steps_that_are_kept_need_a_known_cadence(tiny: Tiny) -> None:
    ended = tiny.launch("checkpoint.save_every=auto", "checkpoint.keep_every=100")
    refused(ended, "checkpoint.keep_every checkpoint.save_every auto checkpoint.save_every=100")


def test_a_run_saves_by_itself(tiny: Tiny) -> None:
    ended = tiny.launch("checkpoint.save_every=auto", "train.steps=24", "train.eval_every=none")

    assert ended.code == 0, ended.err
    assert sorted(int(path.name) for path in tiny.runs.glob("*/checkpoints/*")) == [20, 24]
    assert "step 20/24  saves every " in ended.out
