"""Turns signals into requests to stop, or to save and go on, after a step: the same one in all processes of a run."""

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, Self, override

from jaxinfra.processes.peers import Peers, current_peers
from jaxinfra.processes.signal_router import STOPPING, Actions, ignore, route, set_handlers


class StopRequest:
    """Within this context Ctrl-C (SIGINT), SIGTERM and SIGHUP set `reason` instead of ending the process.

    A second Ctrl-C interrupts at once; further SIGTERMs change nothing.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._interrupted = False
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Name of the first signal, or None; raises KeyboardInterrupt after a second Ctrl-C.

        The handler raises that, too, but Python drops an exception raised in a garbage collector callback.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        return self._reason

    def __enter__(self) -> Self:
        self._before = route(self._actions())
        return self

    def __exit__(self, *exception: object) -> None:
        set_handlers(self._before)

    def _actions(self) -> Actions:
        return dict.fromkeys(STOPPING, self._stop)

    def _stop(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self._reason is not None:
            self._interrupted = True
            raise KeyboardInterrupt
        self._reason = self._reason or number.name


class RunSignals(StopRequest):
    """Makes requests to all processes of the run (`Peers.request`), also if the main thread is in the compiler.

    The signals of `StopRequest` stop the run, SIGUSR1 saves its state, SIGUSR2 profiles some steps, and SIGQUIT makes
    all processes write the stacks of their threads. Before the first step, and outside of a training, a request to stop
    ends the processes at once, with code 75: there is nothing to save. A second Ctrl-C ends them at once, with code
    130. No signal raises an exception: it could come up anywhere, such as in a callback of JAX, which drops it, or
    half-way through a save.

    Args:
        training: the processes that train; None outside of a training, where `current_peers` are asked, since they may
            join at any time.
        interrupts: whether Ctrl-C is handled here; if not, it raises KeyboardInterrupt as usual.
        profile: what SIGUSR2 does.
    """

    def __init__(
        self,
        training: Peers | None = None,
        *,
        interrupts: bool = True,
        profile: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__()
        self._training, self._interrupts, self._profile = training, interrupts, profile
        self._reader, self._writer = socket.socketpair()
        self._asked = threading.Event()  # all processes have been asked to stop

    @property
    def _peers(self) -> Peers:
        return self._training or current_peers()

    def stops_after(self, completed_steps: int) -> str | None:
        """Returns why the run must stop after this number of steps, or None.

        All processes must call it after every step.
        """
        if self._reason is not None and self._peers.count == 1:
            self._asked.wait()  # for the thread: the step during which the signal came is the last one
        return self._peers.agreement.due("stop", completed_steps)

    def stop_is_due(self, completed_steps: int) -> bool:
        """Whether this process knows already that the run stops after this number of steps; waits for nothing."""
        return self._peers.agreement.is_due("stop", completed_steps)

    def saves_after(self, completed_steps: int) -> str | None:
        """Returns why the state must be saved after this number of steps, or None.

        All processes must call it after every step, before `stops_after`.
        """
        return self._peers.agreement.due("save", completed_steps)

    @override
    def __enter__(self) -> Self:
        if self._training is not None:
            self._training.agreement.begin()
        super().__enter__()
        if self._before:
            # Python runs a handler between two of its own instructions. It writes to this socket at once.
            self._writer.setblocking(False)
            self._outer_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._hear, name="signals", daemon=True).start()
            if self._reason is not None:  # it came before the socket was there
                self._request(signal.Signals[self._reason])
        return self

    @override
    def __exit__(self, *exception: object) -> None:
        if self._training is not None:
            self._training.agreement.end()
        if self._before:
            signal.set_wakeup_fd(self._outer_fd, warn_on_full_buffer=False)
        else:
            self._reader.close()
        super().__exit__(*exception)
        self._writer.close()  # ends the thread

    @override
    def _actions(self) -> Actions:
        stopping = STOPPING if self._interrupts else STOPPING[1:]
        actions: dict[int, Callable[[signal.Signals], object]] = {
            **dict.fromkeys(stopping, self._stop),
            signal.SIGUSR1: ignore,  # the thread does what it asks for
        }
        if self._training is not None:
            actions |= {signal.SIGQUIT: ignore, signal.SIGUSR2: lambda number: self._profile()}
        return actions

    @override
    def _stop(self, number: signal.Signals) -> None:
        self._reason = self._reason or number.name

    def _hear(self) -> None:
        """The thread that hears of signals."""
        handled = self._before.keys() - {signal.SIGUSR2}
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in handled:
                    self._request(signal.Signals(number[0]))

    def _request(self, number: signal.Signals) -> None:
        if number == signal.SIGQUIT:
            self._peers.request_stacks(number.name)
        elif number == signal.SIGUSR1:
            self._peers.request("save", number.name)
        elif number == signal.SIGINT and self._asked.is_set():
            self._peers.interrupt()
        else:
            self._peers.request("stop", number.name)
            self._asked.set()
