"""Agrees on the step after which all processes of a run stop, when one of them is asked to. Sends nothing itself.

A process promises the step that it is going to complete, and waits for the agreement once it has heard of a request.
The last step is the latest that any process has promised: each can reach it, and none has to wait for one that stopped
before. While some process has not completed its first step, no other one has either, because steps are collective. So
nothing would be lost, and all leave at once: compilation may take longer than the time until SIGKILL.
"""

import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future

from jaxinfra.errors import JaxinfraError, Preempted

_SHOW_CURSOR = "\x1b[?25h"


class StopAgreement:
    """The request to stop, the promise of this process, and the step that all have agreed on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._promise: int | None = None
        self._last_step: Future[int] = Future()

    def begin(self) -> None:
        """Notes that a training begins, whose first step must be compiled. Earlier requests do not count."""
        with self._lock:
            self._reason = self._promise = None
            self._last_step = Future()

    def promise(self, reason: str) -> int | None:
        """Notes the request, and returns the step that this process is going to complete; None before the first."""
        with self._lock:
            self._reason = self._reason or reason
            return self._promise

    def decide(self, last_step: int) -> None:
        """Notes what was agreed on."""
        if not self._last_step.done():
            self._last_step.set_result(last_step)

    def fail(self, error: JaxinfraError) -> None:
        """Ends the wait for an agreement."""
        if not self._last_step.done():
            self._last_step.set_exception(error)

    def reason_after(self, completed_steps: int) -> str | None:
        """Returns the request if all stop after this step, else promises the next one; raises the error of a peer."""
        with self._lock:
            if self._reason is None:
                self._promise = completed_steps + 1
                return None
        return self._reason if completed_steps >= self._last_step.result() else None


def last_step(promises: Iterable[int | None]) -> int | None:
    """Returns the step after which all stop; None if they leave at once."""
    steps = [*promises]
    known = [step for step in steps if step is not None]
    return max(known) if len(known) == len(steps) else None


def say_nothing_is_lost(reason: str) -> None:
    """Prints why the process leaves, as `Preempted` would, and gives the terminal its cursor back."""
    if sys.stdout.isatty():
        sys.stdout.write(_SHOW_CURSOR)
    message = f"stopped by {reason} before the first step, nothing to save; start the same command to go on"
    print(Preempted(message), file=sys.stderr, flush=True)
