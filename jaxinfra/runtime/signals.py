"""Turns SIGINT, SIGTERM and SIGHUP into a request to stop after a step, the same step in all processes of a run."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

from jaxinfra.runtime.peers import current_peers

# JAX's cache of programs imports filelock, whose audit hook (`_audit_fork_safety`) runs within calls from C++, too: an
# exception in it would abort the process. An interrupt in it is sent again.
_AUDIT_HOOK = "_audit"
_RETRY_S = 0.01


class StopRequest:
    """Within this context Ctrl-C (SIGINT), SIGTERM and SIGHUP set `reason` instead of ending the process.

    SIGHUP comes when a terminal or an SSH connection closes; under nohup it stays ignored. The training loop calls
    `reason_after` after every step, saves and stops. A second Ctrl-C interrupts at once; further SIGTERMs change
    nothing. The previous handlers are restored on exit. In other threads it does nothing.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._interrupted = False
        self._is_shared = current_peers().count > 1
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Name of the first signal, or None; raises KeyboardInterrupt after a second Ctrl-C.

        The handler raises that, too, but Python drops an exception raised in a garbage collector callback.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        return self._reason

    def reason_after(self, completed_steps: int) -> str | None:
        """Returns why the run must stop after this number of steps, or None; raises KeyboardInterrupt as `reason`.

        All processes must call it after every step: a signal to one of them stops all after the same step.
        """
        reason = self.reason
        if not self._is_shared:
            return reason
        from jax.experimental import multihost_utils

        return (reason or "SIGTERM") if multihost_utils.reached_preemption_sync_point(completed_steps) else None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread alone: this run cannot be asked to stop
        # With several processes JAX has a handler of SIGTERM, which tells the others.
        numbers = [signal.SIGINT, signal.SIGHUP, *([] if self._is_shared else [signal.SIGTERM])]
        for number in numbers:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            self._interrupted = True
            if frame is not None and frame.f_code.co_name.startswith(_AUDIT_HOOK):
                threading.Timer(_RETRY_S, os.kill, (os.getpid(), number)).start()
                return
            raise KeyboardInterrupt
        if self._reason is None and self._is_shared:
            os.kill(os.getpid(), signal.SIGTERM)
        self._reason = self._reason or signal.Signals(number).name
