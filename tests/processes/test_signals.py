import signal

import pytest

from jaxinfra.processes import signal_router
from jaxinfra.processes.requests import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with StopRequest() as stop:
            assert stop.reason is None
            signal.raise_signal(number)
            assert stop.reason == number.name
    finally:
        signal.signal(signal.SIGHUP, before)


def test_further_sigterms_change_nothing() -> None:
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGINT"


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_interrupt_raises(first: signal.Signals) -> None:
    with StopRequest() as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # again, in case the first was dropped
            _ = stop.reason


def test_previous_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_under_nohup_a_closed_terminal_changes_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_shell_ignores_for_its_background_stays_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (*signal_router.STOPPING, signal.SIGUSR1)}
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal_router.route_start()
        signal_router.leave_start(interrupts=True, all_signals=True)
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (signal.SIG_IGN, signal.SIG_DFL)
        signal_router.route_end(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal_router.set_handlers(before)


def test_the_end_of_a_start_leaves_the_signals_of_a_run() -> None:
    with StopRequest() as stop:
        signal_router.leave_start(interrupts=True, all_signals=True)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "SIGTERM"
