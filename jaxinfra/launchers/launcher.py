"""Starts the processes of a run on this machine and supervises them until the last one has ended. Imports no JAX.

A request to stop reaches every process once. When one fails, the others get a limited time. The exit code is that of
the process that failed by itself. No process outlives the launcher (`tied_process`); when a rank ends, its child
processes are killed.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfra.errors import PeerLostError, Preempted
from jaxinfra.launchers import tied_process
from jaxinfra.launchers.rank_output import Output
from jaxinfra.launchers.restart_policy import CRASHES
from jaxinfra.machine import COMPILE_ANEW
from jaxinfra.processes.signal_router import STOPPING, routed

LEAVE_S = 15.0
"""Time from the failure of a process until SIGTERM: one that notices the loss of a peer leaves by itself."""
TERMINATE_S = 5.0
"""Time from that SIGTERM until SIGKILL."""
_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class ProcessExit:
    """How a process ended."""

    rank: int  # its number
    code: int  # its exit code, or minus the signal that killed it
    sent: frozenset[int] = frozenset()  # the signals that the launcher had sent to it
    pid: int = 0  # its process id; 0 if unknown

    @property
    def is_failure(self) -> bool:
        """Whether the other processes cannot go on."""
        return self.code not in (0, Preempted.exit_code)

    @property
    def text(self) -> str:
        """How it ended, in words."""
        return f"ended with exit code {self.code}" if self.signal is None else f"was killed by {self.signal}"

    @property
    def signal(self) -> str | None:
        """Name of the signal that killed it, or None."""
        number = -self.code
        if number <= 0:
            return None
        return signal.Signals(number).name if number in signal.Signals else f"signal {number}"

    @property
    def is_cause(self) -> bool:
        """Whether it failed by itself: not after the loss of a peer, nor by a signal of the launcher."""
        return self.is_failure and self.code != PeerLostError.exit_code and -self.code not in self.sent


def exit_code(ends: Sequence[ProcessExit], *, stop_requested: bool) -> int:
    """Returns the exit code of a run whose processes ended so, in the order of time."""
    if cause := find_cause(ends):
        return cause.code if cause.code > 0 else PeerLostError.exit_code
    if any(end.code == PeerLostError.exit_code or (end.code < 0 and not stop_requested) for end in ends):
        return PeerLostError.exit_code
    return 0 if ends and all(end.code == 0 for end in ends) else Preempted.exit_code


def find_cause(ends: Sequence[ProcessExit]) -> ProcessExit | None:
    """Returns the end that made the others fail: the first process that failed by itself."""
    return next((end for end in ends if end.is_cause), None)


def launch(command: Sequence[str], environments: Sequence[Mapping[str, str]], logs: Path | None) -> int:
    """Runs the command once for each environment, and returns the exit code of the whole.

    Ctrl-C, SIGTERM and SIGHUP send SIGTERM to every process; a second Ctrl-C kills them, and raises KeyboardInterrupt
    when they are gone. To be called in the main thread, which alone receives signals.

    Args:
        command: the same for all processes.
        environments: for each rank, the variables to add to those of this process.
        logs: a folder for `rank-N.log`, StorageError if it is not writable; None keeps no logs.
    """
    launcher = Launcher()
    with Output(logs, len(environments)) as output, launcher.handling_signals():
        ends = launcher.run(command, environments, output)
    killed = show_errors(ends, output)
    if launcher.interrupted and any(end.code < 0 for end in ends):
        raise KeyboardInterrupt
    if killed:
        fix = f", with {COMPILE_ANEW}=1 if it happens again" if killed.signal in CRASHES else ""
        output.say(f"error: process {killed.rank} {killed.text}; start the same command to go on{fix}")
    return exit_code(ends, stop_requested=launcher.stop_requested)


def show_errors(ends: Sequence[ProcessExit], output: Output) -> ProcessExit | None:
    """Shows the errors of the processes, and returns the one that a signal has killed, which no error names then."""
    cause = find_cause(ends)
    killed = cause if cause and cause.code < 0 else None
    output.show_errors(killed and killed.rank)
    return killed


class _Child:
    """A process of the run; it leads a session, so that the terminal's Ctrl-C reaches the launcher alone."""

    def __init__(self, rank: int, command: Sequence[str], environment: Mapping[str, str], output: Output) -> None:
        self.rank = rank
        self._sent: set[int] = set()
        stdout, stderr = output.open(rank)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", tied_process.__file__, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
            )
        finally:
            os.close(stdout)
            os.close(stderr)

    @property
    def end(self) -> ProcessExit | None:
        """How it ended; None while it runs."""
        code, sent = self.process.poll(), frozenset(self._sent)
        return None if code is None else ProcessExit(rank=self.rank, code=code, sent=sent, pid=self.process.pid)

    def terminate(self) -> None:
        """Sends SIGTERM, but only once."""
        if signal.SIGTERM not in self._sent and self.process.poll() is None:
            self._sent.add(signal.SIGTERM)
            self.process.terminate()

    def kill(self) -> None:
        """Kills it with all processes that it has started and that are in its session, even if it has ended."""
        if self.process.poll() is None:
            self._sent.add(signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):  # nothing is left
            os.killpg(self.process.pid, signal.SIGKILL)


class Launcher:
    """The running processes, and what they have been asked to do; it may run them several times.

    Attributes:
        stop_requested: whether a signal has asked to stop.
        interrupted: whether Ctrl-C came after that.
    """

    def __init__(self) -> None:
        self.stop_requested = self.interrupted = False
        self._output: Output | None = None
        self._running: list[_Child] = []

    def run(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        output: Output,
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[ProcessExit]:
        """Starts the processes, waits until all have ended, and returns their ends in the order of time.

        Once `is_over`, they get the time that they get when one of them has failed.
        """
        self._output = output
        ends: list[ProcessExit] = []
        failed_at_s: float | None = None
        try:
            for rank, environment in enumerate(environments):
                if not self.stop_requested:
                    output.log(rank, f"--- {time.strftime('%F %T')} {shlex.join(command)}")
                    self._running.append(_Child(rank, command, environment, output))
            while self._running:
                output.relay(_POLL_S)
                ends += self._collect()
                if failed_at_s is None and (any(end.is_failure for end in ends) or is_over()):
                    failed_at_s = time.monotonic()
                self._urge(0.0 if failed_at_s is None else time.monotonic() - failed_at_s)
        finally:  # none is left but after a bug of ours
            for child in self._running:
                child.kill()
                child.process.wait()
        output.drain()
        for end in ends:
            output.log(end.rank, f"--- process {output.first_rank + end.rank} {end.text}")
        self._output = None
        return ends

    def wait(self, wait_s: float) -> None:
        """Waits while nothing runs, at most until a signal asks to stop."""
        deadline_s = time.monotonic() + wait_s
        while not self.stop_requested and (left_s := deadline_s - time.monotonic()) > 0:
            time.sleep(min(_POLL_S, left_s))

    def _collect(self) -> list[ProcessExit]:
        """Removes the processes that have ended, with those that they have left behind, and returns their ends."""
        ended = {child: end for child in self._running if (end := child.end)}
        self._running = [child for child in self._running if child not in ended]
        for child in ended:
            child.kill()
        return list(ended.values())

    def _urge(self, since_failure_s: float) -> None:
        """Sends the signals that are due; a signal of the user may have come while a process was being started."""
        for child in self._running:
            if self.interrupted or since_failure_s > LEAVE_S + TERMINATE_S:
                child.kill()
            elif self.stop_requested or since_failure_s > LEAVE_S:
                child.terminate()

    def handling_signals(self) -> contextlib.AbstractContextManager[None]:
        """Handles the signals of a user, a scheduler and a terminal within this context."""
        actions: dict[int, Callable[[signal.Signals], object]] = {
            **dict.fromkeys(STOPPING, self._handle),
            **dict.fromkeys((signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT), self._pass_on),
            signal.SIGWINCH: lambda number: self._output and self._output.resize(),
        }
        return routed(actions)

    def _pass_on(self, number: signal.Signals) -> None:
        """Passes a signal on to rank 0.

        At SIGUSR1 all processes save, at SIGQUIT all write their stacks, at SIGUSR2 rank 0 profiles a few steps.
        """
        for child in self._running:
            if child.rank == 0:
                child.process.send_signal(number)

    def _handle(self, number: signal.Signals) -> None:
        self.interrupted |= number == signal.SIGINT and self.stop_requested
        if number == signal.SIGINT and not self.stop_requested and self._output is not None:
            self._output.say("stopping: the processes save and leave; Ctrl-C again kills them")
        self.stop_requested = True
        self._urge(0.0)  # at once: a slow terminal may hold up the loop
