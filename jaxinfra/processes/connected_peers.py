"""Keeps the processes of a run in touch: who has joined, who has left and why, and values that all must know.

JAX's own service connects the devices, but says neither who is missing nor who has died, and aborts the process. So
each process also holds a TCP connection to process 0, served by a thread, which is independent of the devices:

- At the start all wait for each other. Missing processes are named.
- A process that is killed closes its connection. The others then leave with the code of `PeerLostError`, also where a
  collective operation would block them forever.
- One that is stopped, or cut off, is silent for `SILENCE_S`; one whose watchdog sees no progress says so. All others
  write their stacks into the run directory, and leave with the code of `HungError`.
- A process that leaves with an error sends it, and all others leave with the same code.
- `Peers.gather` exchanges small values.
- A request to one process stops all after the same step, or makes all save it (`step_agreement`).

The hub of process 0 (`peer_hub`) passes the messages on. The port is that of the coordinator; whoever connects must
know the secret of the start (`door`). JAX's service has a free port of the same host, and does not check who connects.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NoReturn, override

from jaxinfra import __version__
from jaxinfra.errors import (
    CheckpointError,
    ConfigError,
    CorruptionError,
    HungError,
    JaxinfraError,
    PeerLostError,
    Preempted,
    StorageError,
    error_of_code,
)
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.door import Json
from jaxinfra.processes.peer_connection import AGAIN, BEAT_S, JOIN_S, Connection, connect, listen
from jaxinfra.processes.peer_hub import Hub
from jaxinfra.processes.peers import GRACE_S, INTERRUPTED, Peers
from jaxinfra.processes.progress import compare, hung_error
from jaxinfra.processes.step_agreement import Action
from jaxinfra.processes.step_file import round_number
from jaxinfra.user_code import Ending, ending_of

SILENCE_S = 30.0
"""Silence after which a process counts as lost."""
GATHER_S = 600.0
"""Longest wait for a value of another process."""
_LEAVE_S = GRACE_S + 2 * BEAT_S  # in which the others notice an error and leave


class ConnectedPeers(Peers):
    """Several processes, connected through process 0.

    Creating it waits for all of them. Later, if another one is lost or fails, this process is ended after `GRACE_S`
    unless it leaves by itself. Raises, in all processes, PeerLostError if some do not join, and ConfigError if they do
    not fit together.

    Attributes:
        addresses: of this process and of process 0, as their connection has them.

    Args:
        processes: which there are, and which of them this one is.
        secret: of this start, which all processes know.
        join_s: longest wait for all to join.
        silence_s: silence after which a process counts as lost.
    """

    def __init__(
        self, processes: Processes, *, secret: str = "", join_s: float = JOIN_S, silence_s: float = SILENCE_S
    ) -> None:
        super().__init__()
        self.count, self.index, address = processes.count, processes.index, processes.coordinator
        self._address, self._silence_s = address, silence_s
        self._failure: JaxinfraError | None = None
        self._failed, self._leaving, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._own_error: BaseException | None = None  # for which this process has waited for one of another
        self._answers: dict[str, Future[list[Json]]] = {}
        self._rounds: Counter[str] = Counter()
        self._hub = None
        if self.index == 0:
            self._hub = Hub(listen(address), secret, processes, join_s=join_s, silence_s=silence_s)
        deadline_s = time.monotonic() + join_s
        own_name = f"process {self.index} ({self.hosts[0]})"
        hello = {"index": self.index, "count": self.count, "host": self.hosts[0], "version": __version__}
        channel = connect(address, secret, hello, join_s, own_name)
        self.addresses = channel.getsockname()[0], channel.getpeername()[0]
        self._connection = Connection(channel, silence_s)
        joined: Future[Sequence[str]] = Future()
        threading.Thread(target=self._receive, args=(joined,), name="peers", daemon=True).start()
        threading.Thread(target=self._beat, name="peers-beat", daemon=True).start()
        try:
            self.hosts = joined.result(deadline_s - time.monotonic() + 2 * BEAT_S)  # process 0 may say who is missing
        except (JaxinfraError, TimeoutError) as error:
            self._leaving.set()
            self._closed.set()
            self._connection.close()
            if self._hub is not None:  # tells also those that connect a moment later
                self._hub.all_left.wait(GRACE_S)
            if isinstance(error, JaxinfraError):
                raise
            cause = f"did not connect all processes within {join_s:.0f} s of the start of {own_name}"
            raise PeerLostError(f"process 0 at {address}: {cause}; {AGAIN}") from None

    @property
    def has_left(self) -> bool:
        """Whether this process has disconnected."""
        return self._closed.is_set()

    @override
    def gather(self, value: Json, channel: str = "main", wait_s: float | None = None) -> list[Json]:
        found = self._gather({"value": value}, channel, GATHER_S if wait_s is None else wait_s)
        for index, each in enumerate(found):
            if "value" not in each:
                raise PeerLostError(f"{self.name_of(index)}: has ended its program before the others; {AGAIN}")
        return [each["value"] for each in found]

    def _gather(
        self,
        content: Json,
        channel: str,
        wait_s: float,
        late: str = "another process did not reach the same point of the program",
    ) -> list[Json]:
        key = self._next_round(channel)
        answer = self._answers[key] = Future()
        self.raise_if_lost()
        if self.has_left:
            raise ConfigError(f"{self.name_of(self.index)}: has left the others; do this before `with join()` ends")
        self._tell(kind="value", round=key, value=content)
        try:
            return answer.result(wait_s)
        except TimeoutError:
            cause = f"{late} within {wait_s:.0f} s"
            raise PeerLostError(f"{self.name_of(self.index)}: {cause}; {AGAIN}") from None

    def _next_round(self, channel: str) -> str:
        self._rounds[channel] += 1
        return f"{channel} {self._rounds[channel]}"

    @override
    def collect(self, value: Json, channel: str, use: Callable[[list[Json]], object]) -> None:
        key = self._next_round(channel)
        if self.index == 0:
            answer = self._answers[key] = Future()
            # A process that has ended its program has no value.
            answer.add_done_callback(
                lambda done: None if done.exception() else use([each.get("value") for each in done.result()])
            )
        self._tell(kind="value", round=key, value={"value": value}, for_first=True)

    @override
    def request_stacks(self, why: str) -> None:
        self._tell(kind="stacks", why=f"{why} to {self.name_of(self.index)}")

    @override
    def end_hung(self, cause: str) -> None:
        if self.settled is not None:
            self._exit_settled(self.settled)
        self._tell(kind="hung", cause=cause)
        if not self._failed.wait(GRACE_S):  # process 0 is stopped, or cut off
            error = hung_error(f"{self.name_of(self.index)}: {cause}", f"{self.name_of(0)} does not answer")
            self._fail(error)
        self._end_process()

    @override
    def _exit_settled(self, ending: JaxinfraError) -> NoReturn:
        with self.exit_lock:
            self._disconnect(Ending(ending.exit_code, ""))
            time.sleep(BEAT_S)  # JAX's service ends with process 0, and aborts those that are leaving
            super()._exit_settled(ending)

    @override
    def raise_if_lost(self, wait_s: float = 0.0) -> None:
        self._failed.wait(wait_s)
        if self._failure is not None:
            raise self._failure

    @override
    def raise_cause_of(self, error: BaseException) -> None:
        if error is self._own_error or not _may_come_from_a_peer(error):
            return
        self._own_error = error
        self._failed.wait(2 * GRACE_S)
        if self._failure is not None and not str(self._failure).endswith(f": {ending_of(error).line}"):
            raise self._failure

    @override
    def name_of(self, index: int) -> str:
        if len(self.hosts) < self.count and index == 0:  # not all have joined
            return f"process 0 at {self._address}"
        return super().name_of(index)

    @override
    def leave(self, error: BaseException | None = None, wait_s: float = GATHER_S) -> None:
        """Disconnects as `Peers.leave`; without an error it waits at most `wait_s` for the others to leave."""
        with self.exit_lock:  # waits for good if another thread ends this process
            if self.has_left:
                self.raise_if_lost()
                return
        ending = ending_of(error)
        if isinstance(error, CorruptionError) and round_number():  # the other hosts start again without this one
            ending = ending._replace(code=PeerLostError.exit_code)
        try:
            if error is None or ending.code in (0, Preempted.exit_code):  # all stop after the same step
                late = "has ended its program, but another one has not"
                self.is_cut_off = any("left" in each for each in self._gather({"done": True}, "main", wait_s, late))
                if not self.is_cut_off:
                    _disconnect_devices()
            else:
                self.raise_cause_of(error)
        except BaseException as cause:
            ending = ending_of(cause)
            raise
        finally:
            self._disconnect(ending)

    def _disconnect(self, ending: Ending) -> None:
        with self.exit_lock:  # as in `leave`
            self._leaving.set()
        is_failure = ending.code not in (0, Preempted.exit_code)
        self._tell(kind="leave", error=[*ending] if is_failure else None)
        if self._hub is not None:
            # Process 0 leaves last: JAX's service ends with it, and aborts processes that are still connected to it.
            self._hub.all_left.wait(_LEAVE_S)
        self._closed.set()
        self._connection.close()

    @override
    def request(self, action: Action, reason: str) -> None:
        if self._leaving.is_set():
            super()._act_without_steps(action, reason)
        self._tell(kind="ask", action=action, reason=reason)

    def _tell(self, **message: Json) -> None:
        """Sends a message to process 0; if that has gone, the thread that receives notices it."""
        with suppress(OSError):
            self._connection.send(**message)

    @override
    def _act_without_steps(self, action: Action, reason: str) -> None:
        if action == "stop":
            with self.exit_lock:
                self._disconnect(Ending(Preempted.exit_code, ""))
                super()._act_without_steps(action, reason)
        elif self.index == 0:
            super()._act_without_steps(action, reason)

    @override
    def interrupt(self) -> NoReturn:
        with self.exit_lock:
            self._disconnect(Ending(INTERRUPTED, "interrupted"))
            super().interrupt()

    def _receive(self, joined: Future[Sequence[str]]) -> None:
        """The thread that receives messages, until this process leaves."""
        try:
            while (message := self._connection.receive()) is not None:
                match message["kind"]:
                    case "joined":
                        joined.set_result(message["hosts"])
                    case "values" if self._failure is None:
                        self._answers.pop(message["round"]).set_result(message["values"])
                    case "stacks":
                        super().request_stacks(message["why"])
                    case "request":
                        number = message["number"]
                        training, step = self.agreement.request(number, message["action"], message["reason"])
                        with suppress(ConnectionError):  # the next message says so
                            self._connection.send(kind="promise", number=number, training=training, step=step)
                    case "agreed":
                        self.agreement.decide(message["number"], message["training"], message["step"])
                        if message["step"] is None:
                            self._act_without_steps(message["action"], message["reason"])
                    case "failure":
                        self._fail(error_of_code(*message["error"]), joined)
            self._fail(PeerLostError(f"{self.name_of(0)}: was killed; {AGAIN}"), joined, grace_s=0.0)
        except TimeoutError:
            cause = f"{self.name_of(0)}: was silent for {self._silence_s:.0f} s, stopped or cut off"
            self._fail(hung_error(cause, compare({self.index: self.progress()}, self.name_of)), joined, grace_s=0.0)
        except OSError as error:
            self._fail(PeerLostError(f"{self.name_of(0)}: {error.strerror}; {AGAIN}"), joined, grace_s=0.0)

    def _fail(
        self, error: JaxinfraError, joined: Future[Sequence[str]] | None = None, grace_s: float = GRACE_S
    ) -> None:
        """Records the first error of another process. Without `grace_s`: JAX itself would abort within a moment."""
        if self._leaving.is_set():
            return
        if not self._failed.is_set():
            self._failure = error
            if isinstance(error, HungError):
                self.write_stacks(str(error))  # before anybody hears of it and ends the process
            self._failed.set()
            self.agreement.fail(error)
            for answer in list(self._answers.values()):  # the main thread may add one
                answer.set_exception(error)
            if joined is not None and not joined.done():
                joined.set_exception(error)
        if joined is not None and joined.exception() is not None:  # the main thread raises it
            return
        timer = threading.Timer(grace_s, self._end_process)
        timer.daemon = True
        timer.start()

    def _end_process(self) -> None:
        """Ends the process, whose main thread waits for a process that is lost."""
        with self.exit_lock:
            if not self._leaving.is_set():
                ending = ending_of(self._failure)
                self._disconnect(ending)
                self.exit(ending.code, f"error: {ending.line}")

    def _beat(self) -> None:
        with suppress(OSError):  # the receiving thread says so
            while not self._closed.wait(BEAT_S):
                self._connection.send(kind="beat", progress=self.progress())


def _may_come_from_a_peer(error: BaseException) -> bool:
    """Whether the loss of another process may look like this error, such as a failed collective operation."""
    if isinstance(error, StorageError | CheckpointError):
        return error.__cause__ is not None and not isinstance(error.__cause__, OSError)
    return isinstance(error, Exception) and not isinstance(error, JaxinfraError)


def _disconnect_devices() -> None:
    """Waits until all processes have reached the end, and ends JAX's service."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
