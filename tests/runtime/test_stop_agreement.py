"""When a run stops after a request, for one process and for the promises of several."""

import pytest

from jaxinfra.runtime.stop_agreement import Promise, StopAgreement, are_together, last_step


def test_a_request_counts_before_and_after_a_training() -> None:
    """Outside of one a process leaves at once; it would not obey otherwise."""
    stop = StopAgreement()
    assert last_step([stop.promise]) is None
    stop.begin()
    assert last_step([stop.promise]) is None
    assert stop.requested_after(1) is None
    assert last_step([stop.promise]) == 2
    stop.end()
    assert last_step([stop.promise]) is None
    assert "first step" not in stop.describe("SIGTERM")


def test_a_late_decision_does_not_stop_the_next_training() -> None:
    stop = StopAgreement()
    stop.begin()
    assert stop.requested_after(5) is None
    stop.request("SIGTERM")
    training, step = stop.promise
    stop.end()
    stop.begin()
    assert step == 6
    stop.decide(training, step)
    assert stop.requested_after(1) is None
    stop.request("SIGINT")
    stop.decide(stop.promise.training, 2)
    assert stop.requested_after(2) == "SIGINT"


@pytest.mark.parametrize(
    ("promises", "together", "step"),
    [
        ([(1, 4), (1, 6)], True, 6),
        ([(1, None), (1, 2)], True, None),  # one still compiles
        ([(1, 0), (1, 0)], True, None),
        ([(1, 9), (1, 0)], False, None),  # one still saves
        ([(1, 9), (2, None)], False, None),
    ],
)
def test_what_several_agree_on(promises: list[tuple[int, int | None]], together: bool, step: int | None) -> None:
    made = [Promise(*each) for each in promises]
    assert are_together(made) == together
    assert not together or last_step(made) == step
