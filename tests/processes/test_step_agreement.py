"""After which step a run stops or saves, for one process and for the promises of several."""

import threading

import pytest

from jaxinfra.processes.step_agreement import Promise, StepAgreement, agreed_step, are_together


def test_a_request_counts_before_and_after_a_training() -> None:
    """Outside of one a process leaves at once; it would not obey otherwise."""
    agreement = StepAgreement()
    assert agreed_step([agreement.promise]) is None
    agreement.begin()
    assert agreed_step([agreement.promise]) is None
    assert agreement.begins(1)
    assert agreed_step([agreement.promise]) is None, "the first step is compiled"
    agreement.dispatches(1)
    assert agreed_step([agreement.promise]) == 1, "no batch is there yet, it may never come"
    assert agreement.begins(2)
    assert agreed_step([agreement.promise]) == 2
    agreement.end()
    assert agreed_step([agreement.promise]) is None
    assert "first step" not in agreement.describe("SIGTERM")


def test_a_late_decision_does_not_stop_the_next_training() -> None:
    agreement = StepAgreement()
    agreement.begin()
    agreement.dispatches(5)
    training, step = agreement.request(1, "stop", "SIGTERM")
    agreement.end()
    agreement.begin()
    assert step == 5
    agreement.decide(1, training, step)
    assert agreement.begins(1)
    agreement.dispatches(1)
    assert agreement.due("stop", 1) is None
    agreement.decide(2, agreement.request(2, "stop", "SIGINT").training, 1)
    assert agreement.due("stop", 1) == "SIGINT"
    assert not agreement.begins(2)


def test_a_promise_holds_until_all_have_agreed() -> None:
    """Another process has begun step 4, so this one makes it, too."""
    agreement = StepAgreement()
    agreement.begin()
    agreement.dispatches(3)
    training, step = agreement.request(1, "stop", "SIGTERM")
    begun = []
    loop = threading.Thread(target=lambda: begun.extend([agreement.begins(4), agreement.begins(5)]))
    loop.start()
    loop.join(0.2)
    assert (begun, step, agreement.promise.step) == ([], 3, 3)
    agreement.decide(1, training, 4)
    loop.join(600)
    assert begun == [True, False]


def test_each_request_to_save_saves_once() -> None:
    """A second one that comes while a slower process has not done the first is another request."""
    agreement = StepAgreement()
    agreement.begin()
    agreement.dispatches(1)
    for number, step in ((1, 3), (2, 4)):
        agreement.decide(number, agreement.request(number, "save", f"SIGUSR1 {number}").training, step)
    assert [agreement.due("save", step) for step in range(2, 6)] == [None, "SIGUSR1 1", "SIGUSR1 2", None]
    agreement.decide(3, agreement.request(3, "save", "dropped").training, None)
    assert agreement.due("save", 6) is None and agreement.begins(7)


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
    assert not together or agreed_step(made) == step
