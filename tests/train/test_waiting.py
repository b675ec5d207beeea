"""Waits for batches: the phase that the watchdog sees, the seconds that count, and requests meanwhile."""

import time
from types import SimpleNamespace
from typing import Any

from jaxinfra.train.phases import Phases
from jaxinfra.train.waiting import Waiting


def reporting() -> Any:
    return SimpleNamespace(phases=Phases(), devices_are_busy=False, data_wait_s=0.0)


def test_a_batch_that_is_late_is_one_wait_for_the_watchdog() -> None:
    """The idle time grows from poll to poll: otherwise no deadline would ever pass."""
    made, seen, late = reporting(), [], iter([None, None, None, (3, {})])
    made.phases.enter("step")

    def poll(timeout_s: float) -> Any:
        time.sleep(0.01)
        seen.append((made.phases.current, made.phases.idle_s()))
        return next(late)

    waiting = Waiting(made)
    assert waiting.next_batch(poll, lambda: None, is_first=True) == (3, {})
    assert [phase for phase, _ in seen] == ["step", "data", "data", "data"]
    assert seen[1][1] < seen[2][1] < seen[3][1]
    assert waiting.first_s == made.data_wait_s >= 0.03
    assert made.phases.current == "step"


def test_a_request_ends_the_wait_and_counts_no_seconds() -> None:
    made, reasons = reporting(), iter([None, "SIGTERM"])
    found = Waiting(made).next_batch(lambda timeout_s: None, lambda: next(reasons), is_first=False)
    assert (found, made.data_wait_s) == ("SIGTERM", 0.0)


def test_while_the_devices_are_busy_nothing_is_late() -> None:
    made, late = reporting(), iter([None, None, (1, {})])
    made.devices_are_busy = True
    found = Waiting(made).next_batch(lambda timeout_s: next(late), lambda: "never", is_first=False)
    assert (found, made.data_wait_s) == ((1, {}), 0.0)
