"""Waits for batches: the phase that the watchdog sees, and the seconds that count."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfra.train.loop import Loop
from jaxinfra.train.phases import Phases
from jaxinfra.train.waiting import Waiting, input_bound_warning
from tests.refusals import names


def reporting(*, devices_are_busy: bool = False) -> Any:
    return SimpleNamespace(phases=Phases(), devices_are_busy=devices_are_busy, data_wait_s=0.0)


class EnoughError(Exception):
    """Ends a loop whose batch never comes."""


def test_a_late_batch_is_one_wait_for_the_watchdog() -> None:
    """The idle time grows from poll to poll: otherwise its deadline would never pass."""
    made, seen, unused = reporting(), list[tuple[str, float]](), Any
    made.phases.enter("step")

    def poll(timeout_s: float) -> None:
        time.sleep(0.01)
        seen.append((made.phases.current, made.phases.idle_s()))
        if len(seen) == 4:
            raise EnoughError

    def no_call(*arguments: object) -> None:
        raise AssertionError("nothing is due without a batch")

    waiting = Waiting(made)
    calls = {"check_owner": no_call, "after_step": no_call, "save": no_call}
    loop = Loop(unused, unused, 0, made, unused, waiting, unused, unused, **calls)
    with pytest.raises(EnoughError):
        loop.run(poll, 5)
    assert [phase for phase, _ in seen] == ["step", "data", "data", "data"]
    assert seen[1][1] < seen[2][1] < seen[3][1]
    assert (loop.waiting.first_s, made.data_wait_s, made.phases.current) == (0.0, 0.0, "step")


def test_the_seconds_of_a_batch_that_has_come_count() -> None:
    made = reporting()
    waiting = Waiting(made)
    for _ in range(2):
        late = iter([None, None, (1, {})])

        def poll(timeout_s: float, late: Iterator[Any] = late) -> Any:
            time.sleep(0.01)
            return next(late)

        assert waiting.next(poll, lambda: None) == (1, {})
    assert waiting.first_s >= 0.01 and made.data_wait_s >= waiting.first_s + 0.01


def test_while_the_devices_are_busy_nothing_is_late() -> None:
    made, late = reporting(devices_are_busy=True), iter([None, None, (1, {})])
    assert Waiting(made).next(lambda timeout_s: next(late), lambda: "late") == (1, {})
    assert made.data_wait_s == 0.0
    assert Waiting(reporting()).next(lambda timeout_s: None, lambda: "late") == "late"


def test_a_run_that_hardly_waits_does_not_warn():
    assert input_bound_warning(5.0, 100.0, {"reading": 50.0, "decoding": 1.0}) is None


def test_the_slowest_stage_is_named():
    found = input_bound_warning(20.0, 100.0, {"reading": 5.0, "decoding": 50.0})
    names(found or "", "20.0 100.0 decoding is reading 5.0 data.threads")
