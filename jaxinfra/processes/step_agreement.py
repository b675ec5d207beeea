"""Agrees on the step after which all processes of a run stop, or save and go on. Sends nothing itself.

A process promises the last step that it makes, before it begins the step; a request holds the promise where it is. The
agreed step is the latest that any process has promised: each can reach it, and none has to wait for one that stopped
before. A process that waits for a batch has promised no further step, so a batch that never comes delays nobody, unless
others have begun the step of that batch already, which they cannot complete alone.

The first step is promised once it is dispatched. While some process has not done that, no other one has completed a
step, because steps are collective. So nothing would be lost, and at a request to stop all leave at once: compilation
may take longer than the time until SIGKILL. A request to save is dropped then.

Outside of a training all leave at once, too. While some are at its end and others have left it, nothing is agreed on.
"""

import sys
import threading
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jaxinfra.errors import JaxinfraError, PeerLostError

type Action = Literal["stop", "save"]

_AGREE_S = 600.0
"""Longest wait for an agreement."""
_NEVER = sys.maxsize
"""The agreed step of a request that is dropped."""


class Promise(NamedTuple):
    """How far a process is.

    Attributes:
        training: number of trainings that it has begun.
        step: of the last one, which it completes; None before the first is dispatched, 0 if that training has ended.
    """

    training: int
    step: int | None


@dataclass(frozen=True, kw_only=True)
class _Request:
    """A request to all processes."""

    action: Action  # what they do after the agreed step
    reason: str  # the signal, and the process that got it
    step: Future[int] = field(default_factory=Future)  # after which they do it


class StepAgreement:
    """The requests to all processes, by a number that all know, and the `promise` of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self.promise = Promise(0, 0)

    def begin(self) -> None:
        """Records that a training begins, whose first step must be compiled. Earlier requests do not count."""
        with self._lock:
            self._requests, self.promise = {}, Promise(self.promise.training + 1, None)

    def end(self) -> None:
        """Records that the training has ended."""
        with self._lock:
            self.promise = self.promise._replace(step=0)

    def request(self, number: int, action: Action, reason: str) -> Promise:
        """Records a request and returns the promise, which goes no further before `decide`."""
        with self._lock:
            self._requests.setdefault(number, _Request(action=action, reason=reason))
            return self.promise

    def decide(self, number: int, training: int, step: int | None) -> None:
        """Records what was agreed on in a training; a request without a step is dropped."""
        with self._lock:
            request = self._requests.get(number)
            if request is None or training != self.promise.training or request.step.done():
                return
            if step is None:
                del self._requests[number]
            request.step.set_result(_NEVER if step is None else step)

    def fail(self, error: JaxinfraError) -> None:
        """Ends the wait for agreements."""
        with self._lock:
            for request in self._requests.values():
                if not request.step.done():
                    request.step.set_exception(error)

    def begins(self, step: int) -> bool:
        """Promises to make a step, counted from 1; returns False if all stop before it. Raises the error of a peer."""
        while True:
            with self._lock:
                requests = list(self._requests.values())
                if all(request.step.done() for request in requests):
                    if any(request.action == "stop" and request.step.result() < step for request in requests):
                        return False
                    if self.promise.step is not None:  # the first step is promised when it is compiled
                        self.promise = self.promise._replace(step=step)
                    return True
            for request in requests:
                self._agreed_step(request)

    def dispatches(self, step: int) -> None:
        """Records a step that was dispatched; the first one of a training is promised now."""
        with self._lock:
            if self.promise.step is None:
                self.promise = self.promise._replace(step=step)

    def is_due(self, action: Action, completed_steps: int) -> bool:
        """Whether it is known already that a request is due after so many steps; waits for nothing."""
        with self._lock:
            steps = [request.step for request in self._requests.values() if request.action == action]
        return any(step.done() and step.result() <= completed_steps for step in steps)

    def due(self, action: Action, completed_steps: int) -> str | None:
        """Returns the reason of a request that is due after so many steps, and forgets one to save.

        Raises the error of a peer.
        """
        with self._lock:
            asked = {number: request for number, request in self._requests.items() if request.action == action}
        reasons = []
        for number, request in asked.items():
            if self._agreed_step(request) <= completed_steps:
                reasons.append(request.reason)
                if action == "save":
                    with self._lock:
                        self._requests.pop(number, None)
        return reasons[0] if reasons else None

    def _agreed_step(self, request: _Request) -> int:
        try:
            return request.step.result(_AGREE_S)
        except TimeoutError:
            cause = f"the processes did not agree within {_AGREE_S:.0f} s on a step"
            raise PeerLostError(f"{request.reason}: {cause}; start the same command to go on") from None

    def describe(self, reason: str) -> str:
        """Returns why this process leaves at once."""
        if self.promise.step == 0:
            return f"stopped by {reason}"
        return f"stopped by {reason} before the first step, nothing to save; start the same command to go on"


def are_together(promises: Collection[Promise]) -> bool:
    """Whether processes can agree: all are in the same training, or all are outside of one."""
    return len({(training, step == 0) for training, step in promises}) == 1


def agreed_step(promises: Collection[Promise]) -> int | None:
    """Returns the step after which all stop or save; None if nothing is complete yet."""
    steps = [step for _, step in promises if step]
    return max(steps) if len(steps) == len(promises) else None
