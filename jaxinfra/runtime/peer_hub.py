"""The hub of process 0, to which all processes of a run connect, also process 0 itself.

It waits for all of them, passes values on, and tells the others when one leaves, fails, or is lost. Messages are JSON,
one a line.
"""

import errno
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

from jaxinfra import __version__
from jaxinfra.errors import ConfigError, JaxinfraError, PeerLostError, error_of_code
from jaxinfra.runtime.stop_agreement import last_step

type Json = Any
"""A value that JSON can hold."""

BEAT_S = 1.0
"""Time between two messages that only say that a process works."""
AGAIN = "start the same command to go on"
"""The fix in messages about a lost process."""
_RETRY_S = 0.2
_MAX_LINE_BYTES = 2**24


class Connection:
    """Sends and receives messages over a socket."""

    def __init__(self, channel: socket.socket, silence_s: float) -> None:
        channel.settimeout(silence_s)
        self._channel, self._lines, self._lock = channel, channel.makefile("rb"), threading.Lock()

    def send(self, **message: Json) -> None:
        """Sends a message, from any thread; OSError if the other side has gone."""
        with self._lock:
            self._channel.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Json] | None:
        """Returns the next message, None if the other side has closed; TimeoutError after a silence, OSError."""
        line = self._lines.readline(_MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict) or "kind" not in message:
            raise OSError(errno.EPROTO, "does not speak our protocol")
        return message

    def close(self) -> None:
        """Closes both directions."""
        with suppress(OSError):  # the other side has closed
            self._channel.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        self._channel.close()
        self._lines.close()


class Hub:
    """Process 0's side: a connection to each process, itself included, and a thread for each."""

    def __init__(
        self, listener: socket.socket, count: int, known_hosts: Sequence[str], *, join_s: float, silence_s: float
    ) -> None:
        self._listener, self._count, self._known_hosts = listener, count, known_hosts
        self._join_s, self._silence_s = join_s, silence_s
        self._members: dict[int, Connection] = {}
        self._hosts: dict[int, str] = {}
        self._left = set[int]()
        self._values: dict[str, dict[int, Json]] = {}
        self._stop_reason: str | None = None
        self._promises: dict[int, int | None] = {}
        self._failure: JaxinfraError | None = None
        self._lock = threading.RLock()
        self.all_left = threading.Event()
        threading.Thread(target=self._accept, name="peers-accept", daemon=True).start()
        threading.Thread(target=self._beat, name="peers-hub-beat", daemon=True).start()

    def _accept(self) -> None:
        """Accepts connections until all have joined or the time is over; also tells late ones of a failure."""
        deadline_s = time.monotonic() + self._join_s
        self._listener.settimeout(_RETRY_S)
        while len(self._members) < self._count and time.monotonic() < deadline_s:
            try:
                channel, _ = self._listener.accept()
            except OSError:  # none came; or there are too many open files, for a while
                time.sleep(_RETRY_S / 10)
            else:
                threading.Thread(target=self._serve, args=(channel,), name="peers-serve", daemon=True).start()
        self._listener.close()
        if len(self._members) < self._count:
            self._fail(PeerLostError(self._missing()))

    def _missing(self) -> str:
        absent = [index for index in range(self._count) if index not in self._members]
        hosts = {index: f" ({self._known_hosts[index]})" if self._known_hosts else "" for index in absent}
        listed = ", ".join(f"{index}{hosts[index]}" for index in absent[:8]) + (" ..." if len(absent) > 8 else "")
        verb = "processes" if len(absent) > 1 else "process"
        return f"{verb} {listed} of {self._count}: not joined within {self._join_s:.0f} s; start all processes again"

    def _serve(self, channel: socket.socket) -> None:
        """The thread of a connection: receives messages until the process leaves or is lost."""
        with closing(Connection(channel, self._silence_s)) as connection:
            try:
                index = self._admit(connection.receive() or {}, connection)
            except OSError:  # not one of our processes
                return
            if index is not None:
                self._receive(index, connection)

    def _receive(self, index: int, connection: Connection) -> None:
        try:
            cause = "was killed"
            while (message := connection.receive()) is not None:
                if message["kind"] == "value":
                    self._collect(index, message["round"], message["value"])
                elif message["kind"] == "stop":
                    self._request_stop(f"{message['reason']} to {self._name(index)}")
                elif message["kind"] == "promise":
                    self._promise(index, message["step"])
                elif message["kind"] == "leave":
                    self._leave(index, message["error"])
                    return
        except TimeoutError:
            cause = f"was silent for {self._silence_s:.0f} s, stopped or cut off"
        except OSError as error:
            cause = error.strerror or str(error)
        self._fail(PeerLostError(f"{self._name(index)}: {cause}; {AGAIN}"), cause_index=index)

    def _name(self, index: int) -> str:
        return f"process {index} ({self._hosts[index]})"

    def _admit(self, hello: Mapping[str, Json], connection: Connection) -> int | None:
        """Adds a process; returns None if it is none of ours, or if it does not fit, which ends all of them."""
        index, count, host = hello.get("index"), hello.get("count"), hello.get("host")
        if not (isinstance(index, int) and isinstance(count, int) and isinstance(host, str) and 0 <= index < count):
            return None
        own_host = self._hosts.get(0, socket.gethostname())
        with self._lock:
            if index in self._members:
                problem = f"process {index}: on host {self._hosts[index]} and on host {host}; give each its own index"
                self._fail(ConfigError(problem))
            elif count != self._count:
                problem = f"process {index} ({host}): started as one of {count}, process 0 ({own_host}) as one of"
                self._fail(ConfigError(f"{problem} {self._count}; start all with the same number of processes"))
            elif (version := hello.get("version")) != __version__:
                problem = f"process {index} ({host}): has jaxinfra {version}, process 0 ({own_host}) {__version__}"
                self._fail(ConfigError(f"{problem}; install the same version on all hosts"))
            if self._failure is not None:
                connection.send(kind="failure", error=[self._failure.exit_code, str(self._failure)])
                return None
            self._members[index], self._hosts[index] = connection, host
            if len(self._members) == self._count:
                self._send_all(kind="joined", hosts=[self._hosts[each] for each in range(self._count)])
        return index

    def _collect(self, index: int, key: str, value: Json) -> None:
        """Sends the values of a round to all processes once it is complete."""
        with self._lock:
            values = self._values.setdefault(key, {})
            values[index] = value
            if len(values) == self._count:
                del self._values[key]
                self._send_all(kind="values", round=key, values=[values[each] for each in range(self._count)])

    def _request_stop(self, reason: str) -> None:
        """Asks all processes for the step that they are going to complete; one request at a time counts."""
        with self._lock:
            if self._stop_reason is None:
                self._stop_reason = reason
                self._send_all(kind="stop", reason=reason)

    def _promise(self, index: int, step: int | None) -> None:
        """Tells all processes the last step, once each has promised one."""
        with self._lock:
            self._promises[index] = step
            if len(self._promises) == self._count:
                self._send_all(kind="last_step", step=last_step(self._promises.values()), reason=self._stop_reason)
                self._promises, self._stop_reason = {}, None

    def _leave(self, index: int, error: tuple[int, str] | None) -> None:
        with self._lock:
            self._left.add(index)
            if error is not None:
                code, message = error
                self._fail(error_of_code(code, f"{self._name(index)}: {message}"), cause_index=index)
            self._set_if_all_left()

    def _set_if_all_left(self) -> None:
        if len(self._left) == self._count:
            self.all_left.set()

    def _fail(self, error: JaxinfraError, cause_index: int | None = None) -> None:
        """Tells all processes but the one that has caused it; only the first error counts."""
        with self._lock:
            if cause_index is not None:
                self._left.add(cause_index)
                self._set_if_all_left()
            if self._failure is None:
                self._failure = error
                self._send_all(kind="failure", error=[error.exit_code, str(error)])

    def _send_all(self, **message: Json) -> None:
        with self._lock:
            present = [self._members[index] for index in self._members.keys() - self._left]
        for connection in present:
            with suppress(OSError):  # its own thread notices that it is gone
                connection.send(**message)

    def _beat(self) -> None:
        while not self.all_left.wait(BEAT_S):
            self._send_all(kind="beat")


def listen(address: str) -> socket.socket:
    """Returns a socket that listens at HOST:PORT; on loopback if the host is, else on all interfaces."""
    host, port = _split(address)
    is_local, both = is_loopback(host), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if host == "::1" or (both and not is_local) else socket.AF_INET
    try:
        return socket.create_server(
            (host if is_local else "", port), family=family, dualstack_ipv6=both and not is_local
        )
    except OSError as error:
        raise ConfigError(f"{address}: process 0 cannot listen there: {error.strerror}; use another port") from None


def connect(address: str, silence_s: float, join_s: float, name: str) -> tuple[Connection, tuple[str, str]]:
    """Connects to process 0, which may start later; raises PeerLostError if it does not answer in time.

    Returns the connection, and the addresses of this process and of process 0.

    Args:
        address: HOST:PORT of process 0.
        silence_s: longest wait for a message over the connection.
        join_s: longest wait for the connection.
        name: of this process, for messages.
    """
    deadline_s = time.monotonic() + join_s
    while True:
        timeout_s = min(silence_s, max(_RETRY_S, deadline_s - time.monotonic()))
        try:
            channel = socket.create_connection(_split(address), timeout=timeout_s)
            return Connection(channel, silence_s), (channel.getsockname()[0], channel.getpeername()[0])
        except OSError as error:
            if time.monotonic() >= deadline_s:
                cause = error.strerror or str(error)
                raise PeerLostError(
                    f"process 0 at {address}: no answer to {name} within {join_s:.0f} s ({cause}); check that it has "
                    "started, its address, and that no firewall blocks the port"
                ) from None
        time.sleep(_RETRY_S)


def _split(address: str) -> tuple[str, int]:
    """Splits HOST:PORT; an IPv6 address is in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")
