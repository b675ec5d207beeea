"""Turns SIGINT, SIGTERM and SIGHUP into a request to stop after a step, the same step in all processes of a run.

SIGQUIT makes all processes write the stacks of their threads, and go on.
"""

import os
import signal
import socket
import threading
from types import FrameType
from typing import Any, Self, override

from jaxinfra.runtime.peers import current_peers

# JAX's cache of programs imports filelock, whose audit hook (`_audit_fork_safety`) runs within calls from C++, too: an
# exception in it would abort the process. An interrupt in it is sent again.
_AUDIT_HOOK = "_audit"
_RETRY_S = 0.01


class StopRequest:
    """Within this context Ctrl-C (SIGINT), SIGTERM and SIGHUP set `reason` instead of ending the process.

    SIGHUP comes when a terminal or an SSH connection closes; under nohup it stays ignored. A second Ctrl-C interrupts
    at once; further SIGTERMs change nothing. The previous handlers are restored on exit. In other threads than the main
    one it does nothing, because Python delivers signals to that one alone.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._interrupted = False
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Name of the first signal, or None; raises KeyboardInterrupt after a second Ctrl-C.

        The handler raises that, too, but Python drops an exception raised in a garbage collector callback.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        return self._reason

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers():
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _numbers(self) -> tuple[int, ...]:
        return signal.SIGINT, signal.SIGTERM, signal.SIGHUP

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            self._interrupted = True
            if frame is not None and frame.f_code.co_name.startswith(_AUDIT_HOOK):
                threading.Timer(_RETRY_S, os.kill, (os.getpid(), number)).start()
                return
            raise KeyboardInterrupt
        self._reason = self._reason or signal.Signals(number).name


class RunStopRequest(StopRequest):
    """Stops all processes of the run (`Peers.request_stop`), also if the main thread is in the compiler.

    The training loop calls `stops_after` after every step, saves and stops. Before the first step, and outside of a
    training, the processes end at once, with code 75: there is nothing to save.

    Args:
        training: whether steps follow. If not, Ctrl-C interrupts as usual.
    """

    def __init__(self, *, training: bool = True) -> None:
        super().__init__()
        self._training = training
        self._reader, self._writer = socket.socketpair()

    def stops_after(self, completed_steps: int) -> str | None:
        """Returns why the run must stop after this number of steps, or None; raises KeyboardInterrupt as `reason`.

        All processes must call it after every step.
        """
        peers, own = current_peers(), self.reason
        agreed = peers.stop.requested_after(completed_steps)
        return own if peers.count == 1 else agreed

    @override
    def __enter__(self) -> Self:
        if self._training:
            current_peers().stop.begin()
        super().__enter__()
        if self._previous:
            # Python runs a handler between two of its own instructions. It writes to this socket at once.
            self._writer.setblocking(False)
            self._outer_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    @override
    def __exit__(self, *exception: object) -> None:
        if self._training:
            current_peers().stop.end()
        if self._previous:
            signal.set_wakeup_fd(self._outer_fd, warn_on_full_buffer=False)
        else:
            self._reader.close()
        super().__exit__(*exception)
        self._writer.close()  # ends the thread

    @override
    def _numbers(self) -> tuple[int, ...]:
        return (*super()._numbers(), signal.SIGQUIT) if self._training else (signal.SIGTERM, signal.SIGHUP)

    @override
    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGQUIT:  # the thread writes the stacks
            super()._handle(number, frame)

    def _watch(self) -> None:
        """The thread that hears of signals."""
        handled = self._previous.keys()
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] == signal.SIGQUIT and self._training:
                    current_peers().request_stacks("SIGQUIT")
                elif number[0] in handled:
                    current_peers().request_stop(signal.Signals(number[0]).name)
