"""Handles the signals that come while Python imports the command line: nothing has begun, so the process leaves.

By default SIGTERM would end it with 143, and Ctrl-C would raise KeyboardInterrupt somewhere in an import, or in a
callback of JAX, which drops it. `cli.main` hands each command the handlers that it expects. Imports nothing heavy.
"""

import os
import signal
from types import FrameType
from typing import NoReturn

from jaxinfra.errors import Preempted

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def install() -> None:
    """Handles the signals; SIGHUP stays ignored under nohup."""
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    signal.signal(signal.SIGUSR1, _save_nothing)


def give_back(*, interrupts: bool, all_signals: bool) -> None:
    """Makes signals do what they do in any Python program, where `install` has changed that.

    Args:
        interrupts: Ctrl-C raises KeyboardInterrupt.
        all_signals: the others end the process.
    """
    if interrupts and signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if all_signals:
        for number, handler in ((signal.SIGTERM, _leave), (signal.SIGHUP, _leave), (signal.SIGUSR1, _save_nothing)):
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)


def end_with(code: int) -> None:
    """Makes a signal end the process with the exit code of the command, which has ended."""
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(code))
    signal.signal(signal.SIGUSR1, _save_nothing)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    name = signal.Signals(number).name
    text = f"stopped by {name} at the start, nothing to save; start the same command to go on\n"
    try:
        os.write(2, text.encode())
    finally:
        os._exit(Preempted.exit_code)


def _save_nothing(number: int, frame: FrameType | None) -> None:
    """Does nothing; unlike SIG_IGN, it is not inherited by other programs."""
