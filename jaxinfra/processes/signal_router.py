"""Routes the signals of this process: the only module that installs handlers.

What a signal does depends on how far the process is:

    state       Ctrl-C, SIGTERM, SIGHUP                  SIGUSR1          SIGUSR2          SIGQUIT
    starting    it leaves: nothing has begun             -                -                -
    computing   all processes of the command leave       nothing to save  -                -
    training    all stop after the same step             they save        they profile     they write their stacks
    ended       it leaves with the code of its command   -                -                -

`cli.entry` routes those of a start and of the end, `requests.RunSignals` those between them. Under nohup SIGHUP stays
ignored in all states. Imports nothing heavy, since a signal may come while Python imports the command line: by default
SIGTERM would end it with 143, and Ctrl-C would raise KeyboardInterrupt somewhere in an import.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from jaxinfra.errors import Preempted

type Actions = Mapping[int, Callable[[signal.Signals], object]]
"""What is called at a signal, by its number: in the main thread, between two of its instructions."""

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a process to stop; SIGHUP comes when a terminal or an SSH connection closes."""


def route(actions: Actions) -> dict[int, Any]:
    """Calls these actions at signals from now on; returns the handlers from before.

    Does nothing in other threads than the main one, because Python delivers signals to that one alone.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, action in actions.items():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _Handler(action))
    return before


def set_handlers(handlers: Mapping[int, Any]) -> None:
    """Sets handlers that `route` has returned, or Python's own, in the main thread alone."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # None: it was not set from Python, and cannot be set again
                signal.signal(number, handler)


@contextmanager
def routed(actions: Actions) -> Iterator[None]:
    """Calls these actions at signals within this context."""
    before = route(actions)
    try:
        yield
    finally:
        set_handlers(before)


def route_start() -> None:
    """Lets a signal to stop end the process with the code of Preempted, until a command has its own routes."""
    route({**dict.fromkeys(_not_ignored(), _leave), signal.SIGUSR1: _save_nothing})


def leave_start(*, interrupts: bool, all_signals: bool) -> None:
    """Makes signals do what they do in any Python program, where `route_start` has changed that.

    Args:
        interrupts: Ctrl-C raises KeyboardInterrupt.
        all_signals: the others end the process.
    """
    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler} if interrupts else {}
    if all_signals:
        defaults |= dict.fromkeys((signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), signal.SIG_DFL)
    found = {number: signal.getsignal(number) for number in defaults}
    ours = [number for number, each in found.items() if isinstance(each, _Handler) and each.is_of_start]
    set_handlers({number: defaults[number] for number in ours})


def route_end(code: int) -> None:
    """Makes a signal end the process with the exit code of the command, which has ended."""
    route({**dict.fromkeys(_not_ignored(), lambda number: os._exit(code)), signal.SIGUSR1: ignore})


def _not_ignored() -> list[int]:
    """Returns the signals to stop that this process was not started to ignore: a shell ignores SIGINT for `... &`."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


class _Handler:
    """A handler of Python that calls an action."""

    def __init__(self, action: Callable[[signal.Signals], object]) -> None:
        self.action = action

    @property
    def is_of_start(self) -> bool:
        """Whether `route_start` has set it."""
        return self.action in (_leave, _save_nothing)

    def __call__(self, number: int, frame: object) -> None:
        self.action(signal.Signals(number))


def _leave(number: signal.Signals) -> NoReturn:
    text = f"stopped by {number.name} at the start, nothing to save; start the same command to go on\n"
    try:
        os.write(2, text.encode())
    finally:
        os._exit(Preempted.exit_code)


def _save_nothing(number: signal.Signals) -> None:
    """Does nothing: there is no state yet."""


def ignore(number: signal.Signals) -> None:
    """Does nothing; unlike SIG_IGN, it is not inherited by other programs."""
