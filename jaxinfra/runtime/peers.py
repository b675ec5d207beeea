"""Keeps the processes of a run in touch: who has joined, who has left and why, and values that all must know.

JAX's own service connects the devices, but says neither who is missing nor who has died, and aborts the process. So
each process also holds a TCP connection to process 0, served by a thread, which is independent of the devices:

- At the start all wait for each other. Missing processes are named.
- A process that is killed closes its connection; one that is stopped, or cut off, is silent for `SILENCE_S`. The others
  then leave with the code of `PeerLostError`, also where a collective operation would block them forever.
- A process that leaves with an error sends it, and all others leave with the same code.
- `Peers.gather` exchanges small values.
- A request to stop one process stops all after the same step (`stop_agreement`).

The hub of process 0 (`peer_hub`) passes the messages on. The port is that of the coordinator; JAX's service has a free
one of the same host. Neither asks who connects: they belong into a trusted network.
"""

import atexit
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, Self, override

from jaxinfra import __version__
from jaxinfra.errors import ConfigError, JaxinfraError, PeerLostError, Preempted, error_of_code
from jaxinfra.runtime import cpu_collectives
from jaxinfra.runtime.peer_hub import AGAIN, BEAT_S, Hub, Json, connect, is_loopback, listen
from jaxinfra.runtime.processes import Processes, find_processes
from jaxinfra.runtime.stop_agreement import StopAgreement, say_nothing_is_lost
from jaxinfra.storage.errors import cause_of
from jaxinfra.user_code import innermost_place

JOIN_S = 300.0
"""Longest wait for all processes to join."""
SILENCE_S = 10.0
"""Silence after which a process counts as lost."""
_JAX_HEARTBEAT_S = 100  # its default; longer than ours, so that we say who is silent
GRACE_S = 3.0
"""Time that the main thread gets to leave by itself, before the process is ended."""
GATHER_S = 600.0
"""Longest wait for a value of another process."""


class Peers:
    """The processes of a run; this base class is a run of one.

    Attributes:
        index: of this process.
        count: number of processes.
        hosts: the host of each process.
        stop: when this process stops, if one is asked to.
    """

    index, count = 0, 1

    def __init__(self) -> None:
        self.hosts: Sequence[str] = (socket.gethostname(),)
        self.stop = StopAgreement()

    def request_stop(self, reason: str) -> None:
        """Stops all processes after the same step; ends them at once, with code 75, before the first one."""
        if (step := self.stop.promise(reason)) is None:
            self._leave_at_once(reason)
        self.stop.decide(step)

    def _leave_at_once(self, reason: str) -> NoReturn:
        """Ends the process from any thread: the main thread may be in the compiler, which no exception reaches."""
        say_nothing_is_lost(reason)
        os._exit(Preempted.exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Leaves the others; raises the error of another process if this one's may come from it."""
        if isinstance(error, JaxinfraError) and not isinstance(error, Preempted):
            self.close(error, error.exit_code)
        elif isinstance(error, Exception) and not isinstance(error, Preempted):
            self.raise_if_lost(wait_s=2 * GRACE_S)
            self.close(error, 1 if innermost_place(error) is None else ConfigError.exit_code)
        elif error is not None and not isinstance(error, Preempted):
            self.close(error, 130)
        else:  # done, or all stop after the same step
            self.close()

    def gather(self, value: Json, channel: str = "main", wait_s: float | None = None) -> list[Json]:
        """Returns the values of all processes by index; all processes must call it. Raises the error of a peer.

        Threads may call it at the same time on channels of their own. `wait_s` is the longest wait for the others,
        `GATHER_S` by default.
        """
        return [value]

    def broadcast(self, value: Json) -> Json:
        """Returns the value of process 0; all processes must call it."""
        return self.gather(value if self.index == 0 else None)[0]

    def raise_if_lost(self, wait_s: float = 0.0) -> None:
        """Raises the error of a peer if there is one now, or comes within a time."""

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

    def close(self, error: BaseException | None = None, code: int = 1) -> None:
        """Leaves the others, which end with this error and exit code; without one, waits until all leave.

        Raises the error of another process that fails meanwhile.
        """


_current = Peers()


def current_peers() -> Peers:
    """Returns the processes of this run, a run of one before `join`."""
    return _current


def join(processes: Processes | None = None, *, join_s: float = JOIN_S, silence_s: float = SILENCE_S) -> Peers:
    """Connects the processes of a run, and their devices; they are `current_peers` from now on.

    Takes the place of `jax.distributed.initialize`, and must be called before anything asks JAX for its devices. If
    that was called already, as by Ray's JaxTrainer on GPUs and TPUs, the devices stay connected as they are. Raises
    PeerLostError and ConfigError as `ConnectedPeers`.

    The end of the script leaves the others. Where the process goes on, as a worker of Ray does, use `with join():`.

    Args:
        processes: which processes there are; by default what the environment says (`find_processes`).
        join_s: longest wait for all to join.
        silence_s: silence after which a process counts as lost.
    """
    global _current
    if _current.count > 1:
        return _current
    if processes is None and (processes := find_processes(os.environ)) is None:
        return _current
    peers = ConnectedPeers(
        processes.coordinator,
        processes.count,
        processes.index,
        known_hosts=processes.hosts,
        join_s=join_s,
        silence_s=silence_s,
    )
    import jax

    if jax.distributed.is_initialized():
        assert jax.process_index() == processes.index, "the launcher has given JAX another index than ours"
        _current = peers
        _leave_at_exit(peers)
        return peers
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM, and acts between steps only
    host = processes.coordinator.rpartition(":")[0]
    service = f"{host}:{peers.broadcast(_free_port())}"
    try:
        jax.distributed.initialize(
            service,
            processes.count,
            processes.index,
            local_device_ids=processes.local_devices,
            cluster_detection_method="deactivate",
            coordinator_bind_address=service if is_loopback(host) else None,
            initialization_timeout=round(join_s),
            heartbeat_timeout_seconds=round(max(_JAX_HEARTBEAT_S, 2 * silence_s)),
            shutdown_timeout_seconds=round(2 * silence_s),
        )
        cpu_collectives.use_address(cpu_collectives.reachable_address(peers.gather(peers.ends), peers.index))
    except jax.errors.JaxRuntimeError as error:
        problem = PeerLostError(f"{service}: JAX's service does not connect the processes: {cause_of(error)}; {AGAIN}")
        peers.close(problem, problem.exit_code)
        raise problem from error
    except BaseException as error:
        peers.close(error)
        raise
    _current = peers
    _leave_at_exit(peers)
    return peers


def _leave_at_exit(peers: Peers) -> None:
    """Makes a script leave the other processes when it ends, with the exit code of its error if it has one."""

    def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, JaxinfraError):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            show(kind, error, trace)
        code = error.exit_code if isinstance(error, JaxinfraError) else 1
        peers.close(error, code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # JAX would wait for the others

    def leave() -> None:
        try:
            peers.close()
        except JaxinfraError as error:
            end(type(error), error, None)

    show, sys.excepthook = sys.excepthook, end
    atexit.register(leave)


class ConnectedPeers(Peers):
    """Several processes, connected through process 0.

    Creating it waits for all of them. Later, if another one is lost or fails, this process is ended after `GRACE_S`
    unless it leaves by itself. Raises, in all processes, PeerLostError if some do not join, and ConfigError if they do
    not fit together.

    Attributes:
        ends: the addresses of this process and of process 0, as their connection has them.

    Args:
        address: HOST:PORT of process 0.
        count: number of processes.
        index: of this one.
        known_hosts: hosts that a scheduler named, for messages about processes that are missing.
        join_s: longest wait for all to join.
        silence_s: silence after which a process counts as lost.
    """

    def __init__(
        self,
        address: str,
        count: int,
        index: int,
        *,
        known_hosts: Sequence[str] = (),
        join_s: float = JOIN_S,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__()
        self.count, self.index, self._address, self._silence_s = count, index, address, silence_s
        self._failure: JaxinfraError | None = None
        self._failed, self._leaving, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._answers: dict[str, Future[list[Json]]] = {}
        self._rounds: Counter[str] = Counter()
        self._hub = None
        if index == 0:
            self._hub = Hub(listen(address), count, known_hosts, join_s=join_s, silence_s=silence_s)
        deadline_s = time.monotonic() + join_s
        own_name = f"process {index} ({self.hosts[0]})"
        self._connection, self.ends = connect(address, silence_s, join_s, own_name)
        with suppress(OSError):  # the receiving thread says so
            self._connection.send(kind="hello", index=index, count=count, host=self.hosts[0], version=__version__)
        joined: Future[Sequence[str]] = Future()
        threading.Thread(target=self._receive, args=(joined,), name="peers", daemon=True).start()
        threading.Thread(target=self._beat, name="peers-beat", daemon=True).start()
        try:
            self.hosts = joined.result(deadline_s - time.monotonic() + 2 * BEAT_S)  # process 0 may say who is missing
        except (JaxinfraError, TimeoutError) as error:
            self._leaving.set()
            self._closed.set()
            self._connection.close()
            if isinstance(error, JaxinfraError):
                raise
            cause = f"did not connect all processes within {join_s:.0f} s of the start of {own_name}"
            raise PeerLostError(f"process 0 at {address}: {cause}; {AGAIN}") from None

    @override
    def gather(self, value: Json, channel: str = "main", wait_s: float | None = None) -> list[Json]:
        found = self._gather({"value": value}, channel, GATHER_S if wait_s is None else wait_s)
        for index, each in enumerate(found):
            if "value" not in each:
                raise PeerLostError(f"{self.name_of(index)}: has ended its program before the others; {AGAIN}")
        return [each["value"] for each in found]

    def _gather(self, content: Json, channel: str = "main", wait_s: float = GATHER_S) -> list[Json]:
        self._rounds[channel] += 1
        key = f"{channel} {self._rounds[channel]}"
        answer = self._answers[key] = Future()
        self.raise_if_lost()
        self._connection.send(kind="value", round=key, value=content)
        try:
            return answer.result(wait_s)
        except TimeoutError:
            cause = f"another process did not reach the same point of the program within {wait_s:.0f} s"
            raise PeerLostError(f"{self.name_of(self.index)}: {cause}; {AGAIN}") from None

    @override
    def raise_if_lost(self, wait_s: float = 0.0) -> None:
        self._failed.wait(wait_s)
        if self._failure is not None:
            raise self._failure

    @override
    def name_of(self, index: int) -> str:
        if len(self.hosts) < self.count and index == 0:  # not all have joined
            return f"process 0 at {self._address}"
        return super().name_of(index)

    @override
    def close(self, error: BaseException | None = None, code: int = 1) -> None:
        if self._leaving.is_set():
            return
        if error is None:
            self._gather({"ends": True})  # JAX waits for the others only for a short time
            _disconnect_devices()
        self._leaving.set()
        with suppress(OSError):  # process 0 has gone
            self._connection.send(kind="leave", error=None if error is None else [code, _line(error)])
        if self._hub is not None:
            # Process 0 leaves last: JAX's service ends with it, and aborts processes that are still connected to it.
            self._hub.all_left.wait(GRACE_S + 2 * BEAT_S)
        self._closed.set()
        self._connection.close()

    @override
    def request_stop(self, reason: str) -> None:
        with suppress(OSError):  # process 0 has gone, and the receiving thread says so
            self._connection.send(kind="stop", reason=reason)

    @override
    def _leave_at_once(self, reason: str) -> NoReturn:
        self._leaving.set()
        say_nothing_is_lost(reason)
        with suppress(OSError):  # process 0 has gone
            self._connection.send(kind="leave", error=None)
        if self._hub is not None:
            self._hub.all_left.wait(GRACE_S)
        os._exit(Preempted.exit_code)

    def _receive(self, joined: Future[Sequence[str]]) -> None:
        """The thread that receives messages, until this process leaves."""
        try:
            while (message := self._connection.receive()) is not None:
                match message["kind"]:
                    case "joined":
                        joined.set_result(message["hosts"])
                    case "values":
                        self._answers.pop(message["round"]).set_result(message["values"])
                    case "stop":
                        self._connection.send(kind="promise", step=self.stop.promise(message["reason"]))
                    case "last_step" if message["step"] is None:
                        self._leave_at_once(message["reason"])
                    case "last_step":
                        self.stop.decide(message["step"])
                    case "failure":
                        self._fail(error_of_code(*message["error"]), joined)
            self._fail(PeerLostError(f"{self.name_of(0)}: was killed; {AGAIN}"), joined, grace_s=0.0)
        except TimeoutError:
            cause = f"was silent for {self._silence_s:.0f} s, stopped or cut off"
            self._fail(PeerLostError(f"{self.name_of(0)}: {cause}; {AGAIN}"), joined)
        except OSError as error:
            self._fail(PeerLostError(f"{self.name_of(0)}: {error.strerror}; {AGAIN}"), joined, grace_s=0.0)

    def _fail(self, error: JaxinfraError, joined: Future[Sequence[str]], grace_s: float = GRACE_S) -> None:
        """Notes the first error of another process. Without `grace_s`: JAX itself would abort within a moment."""
        if self._failed.is_set() or self._leaving.is_set():
            return
        self._failure = error
        self._failed.set()
        if not joined.done():
            joined.set_exception(error)
            return
        self.stop.fail(error)
        for answer in list(self._answers.values()):  # the main thread may add one
            answer.set_exception(error)
        timer = threading.Timer(grace_s, self._end_process)
        timer.daemon = True
        timer.start()

    def _end_process(self) -> None:
        """Ends the process, whose main thread waits for a process that is lost."""
        if not self._leaving.is_set():
            assert self._failure is not None
            print(f"error: {self._failure}", file=sys.stderr, flush=True)
            os._exit(self._failure.exit_code)

    def _beat(self) -> None:
        with suppress(OSError):  # the receiving thread says so
            while not self._closed.wait(BEAT_S):
                self._connection.send(kind="beat")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _disconnect_devices() -> None:
    """Waits until all processes have reached the end, and ends JAX's service."""
    import jax

    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
