"""Turns signals into requests to stop, or to save and go on, after a step: the same one in all processes of a run.

SIGQUIT makes all processes write the stacks of their threads, and go on.
"""

import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self, override

from jaxinfra.processes.peers import current_peers


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
            raise KeyboardInterrupt
        self._reason = self._reason or signal.Signals(number).name


class RunSignals(StopRequest):
    """Makes requests to all processes of the run (`Peers.request`), also if the main thread is in the compiler.

    The signals of `StopRequest` stop the run, SIGUSR1 saves its state. The training loop takes its batches from
    `begun`, and asks `saves_after` and `stops_after` after each step. Before the first step, and outside of a training,
    a request to stop ends the processes at once, with code 75: there is nothing to save. A second Ctrl-C ends them at
    once, with code 130. No signal raises an exception: it could come up anywhere, such as in a callback of JAX, which
    drops it, or half-way through a save.

    Args:
        training: whether steps follow.
        interrupts: whether Ctrl-C is handled here; if not, it raises KeyboardInterrupt as usual.
    """

    def __init__(self, *, training: bool = True, interrupts: bool = True) -> None:
        super().__init__()
        self._training, self._interrupts = training, interrupts
        self._reader, self._writer = socket.socketpair()
        self._asked = threading.Event()  # all processes have been asked to stop

    def begun[T](self, batches: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        """Yields the batches of the steps that all processes make; each comes with the number of steps before it."""
        for step, batch in batches:
            if not current_peers().agreement.begins(step + 1):
                return
            yield step, batch

    def stops_after(self, completed_steps: int) -> str | None:
        """Returns why the run must stop after this number of steps, or None.

        All processes must call it after every step.
        """
        if self._reason is not None and current_peers().count == 1:
            self._asked.wait()  # for the thread: the step during which the signal came is the last one
        return current_peers().agreement.due("stop", completed_steps)

    def stop_is_due(self, completed_steps: int) -> bool:
        """Whether this process knows already that the run stops after this number of steps; waits for nothing."""
        return current_peers().agreement.is_due("stop", completed_steps)

    def saves_after(self, completed_steps: int) -> str | None:
        """Returns why the state must be saved after this number of steps, or None.

        All processes must call it after every step, before `stops_after`.
        """
        return current_peers().agreement.due("save", completed_steps)

    @override
    def __enter__(self) -> Self:
        if self._training:
            current_peers().agreement.begin()
        super().__enter__()
        if self._previous:
            # Python runs a handler between two of its own instructions. It writes to this socket at once.
            self._writer.setblocking(False)
            self._outer_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._watch, name="signals", daemon=True).start()
            if self._reason is not None:  # it came before the socket was there
                self._request(signal.Signals[self._reason])
        return self

    @override
    def __exit__(self, *exception: object) -> None:
        if self._training:
            current_peers().agreement.end()
        if self._previous:
            signal.set_wakeup_fd(self._outer_fd, warn_on_full_buffer=False)
        else:
            self._reader.close()
        super().__exit__(*exception)
        self._writer.close()  # ends the thread

    @override
    def _numbers(self) -> tuple[int, ...]:
        stopping = super()._numbers() if self._interrupts else (signal.SIGTERM, signal.SIGHUP)
        return (*stopping, signal.SIGUSR1, *((signal.SIGQUIT,) if self._training else ()))

    @override
    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGUSR1, signal.SIGQUIT):
            self._reason = self._reason or signal.Signals(number).name

    def _watch(self) -> None:
        """The thread that hears of signals."""
        handled = self._previous.keys()
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in handled:
                    self._request(signal.Signals(number[0]))

    def _request(self, number: signal.Signals) -> None:
        if number == signal.SIGQUIT:
            current_peers().request_stacks(number.name)
        elif number == signal.SIGUSR1:
            current_peers().request("save", number.name)
        elif number == signal.SIGINT and self._asked.is_set():
            current_peers().interrupt()
        else:
            current_peers().request("stop", number.name)
            self._asked.set()
