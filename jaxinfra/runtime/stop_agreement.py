"""Agrees on the step after which all processes of a run stop, when one of them is asked to. Sends nothing itself.

A process promises the step that it is going to complete, and waits for the agreement once it has heard of a request.
The last step is the latest that any process has promised: each can reach it, and none has to wait for one that stopped
before. While some process has not completed its first step, no other one has either, because steps are collective. So
nothing would be lost, and all leave at once: compilation may take longer than the time until SIGKILL.

Outside of a training all leave at once, too. While some are at its end and others have left it, nothing is agreed on.
"""

import threading
from collections.abc import Collection
from concurrent.futures import Future
from typing import NamedTuple

from jaxinfra.errors import JaxinfraError, PeerLostError

_AGREE_S = 600.0
"""Longest wait for the agreement."""


class Promise(NamedTuple):
    """How far a process is.

    Attributes:
        training: number of trainings that it has begun.
        step: of the last one, which it is going to complete; None before the first, 0 if that training has ended.
    """

    training: int
    step: int | None


class StopAgreement:
    """The request to stop, the promise of this process, and the step that all have agreed on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._request: str | None = None
        self._promise = Promise(0, 0)
        self._last_step: Future[int] = Future()

    @property
    def promise(self) -> Promise:
        """How far this process is. It goes no further after a request."""
        return self._promise

    def begin(self) -> None:
        """Records that a training begins, whose first step must be compiled. Earlier requests do not count."""
        with self._lock:
            self._request, self._promise = None, Promise(self._promise.training + 1, None)
            self._last_step = Future()

    def end(self) -> None:
        """Records that the training has ended."""
        with self._lock:
            self._promise = self._promise._replace(step=0)

    def request(self, reason: str) -> None:
        """Records a request to stop; only the first one counts."""
        with self._lock:
            self._request = self._request or reason

    def decide(self, training: int, last_step: int) -> None:
        """Records what was agreed on for a training."""
        with self._lock:
            if self._promise.training == training and not self._last_step.done():
                self._last_step.set_result(last_step)

    def fail(self, error: JaxinfraError) -> None:
        """Ends the wait for an agreement."""
        with self._lock:
            if not self._last_step.done():
                self._last_step.set_exception(error)

    def requested_after(self, completed_steps: int) -> str | None:
        """Returns the request if all stop after this step, else promises the next one; raises the error of a peer."""
        with self._lock:
            if self._request is None:
                self._promise = self._promise._replace(step=completed_steps + 1)
                return None
        try:
            return self._request if completed_steps >= self._last_step.result(_AGREE_S) else None
        except TimeoutError:
            cause = f"the processes did not agree within {_AGREE_S:.0f} s when to stop"
            raise PeerLostError(f"{self._request}: {cause}; start the same command to go on") from None

    def describe(self, reason: str) -> str:
        """Returns why this process leaves at once."""
        if self._promise.step == 0:
            return f"stopped by {reason}"
        return f"stopped by {reason} before the first step, nothing to save; start the same command to go on"


def are_together(promises: Collection[Promise]) -> bool:
    """Whether processes can agree: all are in the same training, or all are outside of one."""
    return len({(training, step == 0) for training, step in promises}) == 1


def last_step(promises: Collection[Promise]) -> int | None:
    """Returns the step after which all stop; None if they leave at once."""
    steps = [step for _, step in promises if step]
    return max(steps) if len(steps) == len(promises) else None
