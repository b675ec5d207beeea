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


def due(cadence: Cadence, first: int) -> int:
    """Returns the first step from one on after which a checkpoint is due."""
    return next(step for step in range(first, first + 10_000) if cadence.due_after(step) == "checkpoint")


def test_the_cadence_follows_from_what_was_measured() -> None:
    cadence = Cadence(AUTO, start_step=100, devices=64)  # a failure every hour

    assert due(cadence, 101) == 120
    line = cadence.measured(120, stall_s=2.0, step_s=10.0, saved=True)
    assert line == (
        "saves every 12 steps (120 s): a save stalls training for 2.00 s, and a failure is expected every 1 hours"
    )
    assert due(cadence, 121) == 132
    assert cadence.measured(132, stall_s=2.2, step_s=10.0, saved=True) is None  # nearly the same
    assert due(cadence, 133) == 144


def test_a_save_that_somebody_asked_for_counts() -> None:
    """Also if it is saved after the very step that was due: the next one comes all the same."""
    cadence = Cadence(AUTO, start_step=0, devices=64)
    assert cadence.due_after(21) == cadence.due_after(20) == "checkpoint"
    cadence.measured(20, stall_s=2.0, step_s=10.0, saved=True)
    assert cadence.due_after(21) is None and due(cadence, 21) == 32


@pytest.mark.parametrize("stall_s", [0.0, 600.0])
def test_a_save_that_was_left_out_or_failed_is_tried_again_soon(stall_s: float) -> None:
    cadence = Cadence(AUTO, start_step=0, devices=64)
    assert cadence.measured(20, stall_s=stall_s, step_s=10.0, saved=False) is None
    assert due(cadence, 21) == 40
    assert "12 steps" in (cadence.measured(40, stall_s=2.0, step_s=10.0, saved=True) or "")


def test_it_does_not_save_faster_than_is_written() -> None:
    """A copy takes 1 s, and its write 300 s, for which the next save waits: a failure every 3 hours."""
    cadence, step, now_s, written_s, gaps = Cadence(AUTO, start_step=0, devices=21), 0, 0.0, 0.0, list[int]()
    for _ in range(12):
        saved = due(cadence, step + 1)
        now_s += saved - step
        stall_s = 1.0 + max(0.0, written_s - now_s)
        now_s += stall_s
        written_s = now_s + 300.0
        cadence.measured(saved, stall_s=stall_s, step_s=1.0, saved=True)
        gaps.append(saved - step)
        step = saved
    assert gaps[-1] == gaps[3] == 300, gaps


def test_all_processes_take_that_of_the_first() -> None:
    cadence = Cadence(AUTO, start_step=0, devices=64, broadcast=lambda every: 7)

    cadence.measured(20, stall_s=2.0, step_s=10.0, saved=False)

    assert due(cadence, 21) == 27


def test_one_device_fails_once_a_week() -> None:
    cadence = Cadence(CheckpointConfig(save_every="auto"), 0, devices=1)
    line = cadence.measured(20, stall_s=1.0, step_s=1.0, saved=True)

    assert line is not None and "saves every 1,099 steps" in line and "every 168 hours" in line


def test_copies_between_checkpoints() -> None:
    cadence = Cadence(CheckpointConfig(save_every="auto", local="/dev/shm/x", local_every=8), 0, 1)

    assert {step: cadence.due_after(step) for step in (8, 16, 20)} == {8: "copy", 16: "copy", 20: "checkpoint"}


def test_steps_that_are_kept_need_a_known_cadence(tiny: Tiny) -> None:
    ended = tiny.launch("checkpoint.save_every=auto", "checkpoint.keep_every=100")
    refused(ended, "checkpoint.keep_every checkpoint.save_every auto checkpoint.save_every=100")


def test_the_best_need_a_known_cadence(tiny: Tiny) -> None:
    ended = tiny.launch("checkpoint.save_every=auto", "checkpoint.keep_best=2")
    refused(ended, "checkpoint.keep_best checkpoint.save_every eval_every")


def test_a_run_saves_by_itself(tiny: Tiny) -> None:
    ended = tiny.launch("checkpoint.save_every=auto", "train.steps=24", "train.eval_every=none")

    assert ended.code == 0, ended.err
    assert sorted(int(path.name) for path in tiny.runs.glob("*/checkpoints/*")) == [20, 24]
    assert "step 20/24  saves every " in ended.out
