"""The processes of a run, as the rest of the package sees them.

`Peers` is a run of one process. `join` makes a run of several (`ConnectedPeers`); then these are `current_peers`.
"""

import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, Self

from jaxinfra.errors import ConfigError, JaxinfraError, Preempted, StorageError
from jaxinfra.machine.stacks import StackFiles, all_stacks, threads_that_hang
from jaxinfra.processes.peer_connection import Json
from jaxinfra.processes.progress import hung_error, where
from jaxinfra.processes.step_agreement import Action, StepAgreement, agreed_step

INTERRUPTED = 130
"""Exit code after an interrupt, 128 + SIGINT, as a shell has it."""
GRACE_S = 3.0
"""Time that the main thread gets to leave by itself, and then the last calls, before the process is ended."""
END_S, CLEAN_UP_S = 10.0, 30.0
"""Time that threads, and then packages, get to end in a process that has failed or was asked to stop."""
DONE_S = 600.0
"""That of one whose command has succeeded: a thread of the user may still upload."""
_SHOW_CURSOR = "\x1b[?25h"

_log = logging.getLogger(__name__)


class Peers:
    """The processes of a run; this base class is a run of one.

    Attributes:
        index: of this process.
        count: number of processes.
        hosts: the host of each process.
        agreement: the step after which all stop, or save, if one is asked to.
        last_calls: what `exit` calls, such as to remove a temporary folder.
        exit_lock: of the thread that ends the process; another one that would leave, too, waits for that end.
        stacks: where `write_stacks` writes to; None outside of a training.
        progress: returns how far this process is, for messages of the others: "step" and "phase"; {} outside of one.
        settled: how the training ends, once it was asked to stop and has saved; a hang changes that no more.
        is_cut_off: whether another process has left without this one, so that JAX would wait for it or abort.
    """

    index, count = 0, 1

    def __init__(self) -> None:
        self.hosts: Sequence[str] = (socket.gethostname(),)
        self.agreement = StepAgreement()
        self._requests = itertools.count(1)
        self.last_calls: list[Callable[[], object]] = []
        self.exit_lock = threading.RLock()
        self.stacks: StackFiles | None = None
        self.progress: Callable[[], Mapping[str, Json]] = dict
        self.settled: JaxinfraError | None = None
        self.is_cut_off = False

    def request(self, action: Action, reason: str) -> None:
        """Makes all processes stop, or save, after the same step.

        Before the first step, and outside of a training, a request to stop ends them at once, with code 75.
        """
        number = next(self._requests)
        promise = self.agreement.request(number, action, reason)
        step = agreed_step([promise])
        self.agreement.decide(number, promise.training, step)
        if step is None:
            self._act_without_steps(action, reason)

    def _act_without_steps(self, action: Action, reason: str) -> None:
        """Does what was asked for where there is nothing to save."""
        if action == "save":
            _log.warning("%s: nothing to save before the first step", reason)
        else:
            self.exit(Preempted.exit_code, self.agreement.describe(reason))

    def interrupt(self) -> NoReturn:
        """Ends this process at once, with code 130; the others leave, too. What is being saved is given up."""
        self.exit(INTERRUPTED, "error: interrupted")

    def exit(self, code: int, text: str = "") -> NoReturn:
        """Prints a text and ends the process, from any thread.

        The main thread may be in the compiler or a collective operation, which no exception reaches. Standard error may
        be closed, or nobody may read it: the process ends all the same.
        """
        self.exit_lock.acquire()
        try:
            deadline_s = time.monotonic() + GRACE_S
            calls = [
                threading.Thread(target=call, daemon=True) for call in (lambda: _print_last(text), *self.last_calls)
            ]
            for call in calls:
                call.start()
            for call in calls:
                call.join(max(0.0, deadline_s - time.monotonic()))
        finally:
            os._exit(code)

    def exit_soon(self, code: int) -> None:
        """Ends this process after a time unless it has ended by itself, and names what it would wait for.

        Python waits for threads of Grain, of `concurrent.futures` and of clients of storage or metrics, and for what
        packages do at exit, without a limit.
        """

        def end() -> None:
            time.sleep(END_S if code else DONE_S)
            if not (hanging := threads_that_hang(with_main=False)):
                time.sleep(CLEAN_UP_S - END_S)
                hanging = threads_that_hang()
            self.exit(code, f"left with exit code {code} without waiting for {', '.join(hanging)}")

        threading.Thread(target=end, name="end", daemon=True).start()

    def write_stacks(self, why: str) -> None:
        """Writes the stacks of all threads of this process as they are now, in a thread that `exit` waits for."""
        if (files := self.stacks) is None:
            return
        text = f"{self.name_of(self.index)}: {why}\n\n{all_stacks()}"

        def write() -> None:
            try:
                files.write(text)
            except (OSError, StorageError) as error:
                _log.error("%s: the stacks cannot be written: %s", files.folder, error)
            finally:
                self.last_calls.remove(thread.join)

        thread = threading.Thread(target=write, name="stacks", daemon=True)
        self.last_calls.append(thread.join)
        thread.start()

    def request_stacks(self, why: str) -> None:
        """Makes all processes write their stacks; they go on."""
        self.write_stacks(why)
        if self.stacks is not None:
            _log.warning("%s: stacks of all threads written to %s", why, self.stacks.folder)

    def end_hung(self, cause: str) -> None:
        """Ends all processes with the code of HungError, from any thread, after they have written their stacks.

        Returns only if this process leaves by itself now.

        `cause` says what does not go on, such as "no progress in step for 600 s".
        """
        if self.settled is not None:
            self._exit_settled(self.settled)
        error = hung_error(cause, f"it is {where(self.progress())}")
        self.write_stacks(str(error))
        self.exit(error.exit_code, f"error: {error}")

    def _exit_settled(self, ending: JaxinfraError) -> NoReturn:
        self.exit(ending.exit_code, f"{ending}; left without waiting for {', '.join(threads_that_hang())}")

    @contextmanager
    def last_call(self, call: Callable[[], object]) -> Iterator[None]:
        """Adds one of the `last_calls` within this context."""
        self.last_calls.append(call)
        try:
            yield
        finally:
            self.last_calls.remove(call)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.leave(error)

    def leave(self, error: BaseException | None = None) -> None:
        """Disconnects from the others, which end with this error and exit code; without one, waits until all leave.

        Raises the error of another process if this one's may come from it.
        """

    def gather(self, value: Json, channel: str = "main", wait_s: float | None = None) -> list[Json]:
        """Returns the values of all processes by index; all processes must call it. Raises the error of a peer.

        Threads may call it at the same time on channels of their own. `wait_s` is the longest wait for the others, 10
        minutes by default. A value has up to 16 MiB of JSON.
        """
        return [value]

    def collect(self, value: Json, channel: str, use: Callable[[list[Json]], object]) -> None:
        """Calls `use` in process 0 with the values of all processes by index, from a thread, once it has them all.

        All processes must call it; none waits.
        """
        use([value])

    def broadcast(self, value: Json) -> Json:
        """Returns the value of process 0; all processes must call it."""
        return self.gather(value if self.index == 0 else None)[0]

    def raise_if_lost(self, wait_s: float = 0.0) -> None:
        """Raises the error of a peer if there is one now, or comes within a time."""

    def raise_cause_of(self, error: BaseException) -> None:
        """Raises the error of a peer if this process's own error may come from it."""

    @contextmanager
    def naming_causes(self) -> Iterator[None]:
        """Raises the error of a peer in place of one that comes from it inside the block."""
        try:
            yield
        except Exception as error:
            self.raise_cause_of(error)
            raise

    def require_equal(self, values: Mapping[str, Json]) -> None:
        """Raises ConfigError if a value differs between processes; names the first one that differs from process 0."""
        first, *others = self.gather(values)
        for index, other in enumerate(others, 1):
            for name in first:
                if other.get(name) != first[name]:
                    raise ConfigError(
                        f"{self.name_of(index)}: {name} is {other.get(name)}, but {first[name]} in {self.name_of(0)}; "
                        "start all processes with the same command, code and packages"
                    )

    def name_of(self, index: int) -> str:
        """Returns how messages name a process."""
        return f"process {index} ({self.hosts[index]})"


_current = Peers()


def current_peers() -> Peers:
    """Returns the processes of this run, a run of one before `join`."""
    return _current


def set_current_peers(peers: Peers) -> None:
    """Changes the processes of this run."""
    global _current
    _current = peers


def _print_last(text: str) -> None:
    with suppress(OSError):  # its reader has gone
        print(text, end="\n" if text else "", file=sys.stderr, flush=True)
    with suppress(OSError):
        print(end=_SHOW_CURSOR if sys.stdout.isatty() else "", flush=True)
