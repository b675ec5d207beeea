"""Messages between a process of a run and the hub of process 0: JSON over TCP, one a line."""

import errno
import json
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress

from jaxinfra.errors import ConfigError, PeerLostError
from jaxinfra.machine.ports import listener_of
from jaxinfra.processes.door import HELLO_S, SECRET, Json, OtherSecretError, ProtocolError, knock

JOIN_S = 300.0
"""Longest wait for all processes to join."""
BEAT_S = 1.0
"""Time between two messages that only say that a process works."""
RETRY_S = 0.2
"""Time between two attempts to connect."""
AGAIN = "start the same command to go on"
"""The fix in messages about a lost process."""
_MAX_LINE_BYTES = 2**24
_TCP_RTO_MAX_MS, _LONGEST_RTO_MS, _GIVE_UP_MS = 44, 1000, 600_000  # the option: linux/tcp.h, since Linux 6.15
_FIELDS = {
    "joined": {"hosts"},
    "beat": {"progress"},
    "value": {"round", "value"},
    "values": {"round", "values"},
    "stacks": {"why"},
    "hung": {"cause"},
    "ask": {"action", "reason"},
    "request": {"number", "action", "reason"},
    "promise": {"number", "training", "step"},
    "agreed": {"number", "training", "step", "action", "reason"},
    "failure": {"error"},
    "leave": {"error"},
}
"""The kinds of messages, with the fields that each has."""


class Connection:
    """Sends and receives messages over a socket; the hub reads no long lines."""

    def __init__(self, channel: socket.socket, silence_s: float, *, of_hub: bool = False) -> None:
        channel.settimeout(silence_s)
        if sys.platform == "linux":
            # TCP doubles the time until it sends again, so that after 7 s without packets nothing comes for 12.6 s.
            channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP_MS)
            with suppress(OSError):  # an older kernel
                channel.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, _LONGEST_RTO_MS)
        self._channel, self._lines, self._lock = channel, channel.makefile("rb"), threading.Lock()
        self._of_hub, self._is_closed = of_hub, False

    def send(self, **message: Json) -> None:
        """Sends a message, from any thread; OSError if the other side has gone, ValueError if it is too long."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > _MAX_LINE_BYTES and not self._of_hub:
            raise ValueError(f"a message of {len(line)} bytes; at most {_MAX_LINE_BYTES} can be sent: send it in parts")
        with self._lock:
            self._channel.sendall(line)

    def receive(self) -> dict[str, Json] | None:
        """Returns the next message, None if a side has closed; TimeoutError after a silence, OSError."""
        try:
            line = self._lines.readline(_MAX_LINE_BYTES if self._of_hub else -1)
        except ConnectionError:  # closed before it has read all
            return None
        except ValueError:  # of a closed file
            if not self._is_closed:
                raise
            return None
        if len(line) < _MAX_LINE_BYTES and not line.endswith(b"\n"):
            return None
        try:
            message = json.loads(line)
            if _FIELDS[message["kind"]] <= message.keys():
                return message
        except (ValueError, RecursionError, TypeError, KeyError):
            pass  # refused below
        raise ProtocolError

    def close(self) -> None:
        """Closes both directions."""
        self._is_closed = True
        with suppress(OSError):  # the other side has closed
            self._channel.shutdown(socket.SHUT_RDWR)  # wakes the thread that receives
        self._channel.close()
        self._lines.close()


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
        cause = f"{error.strerror}{listener_of(port) if error.errno == errno.EADDRINUSE else ''}"
        raise ConfigError(
            f"{address}: process 0 cannot listen there: {cause}; use another port: in all processes set "
            "JAX_COORDINATOR_PORT, or --coordinator HOST:PORT if you use that"
        ) from None


def connect(address: str, secret: str, hello: Json, join_s: float, name: str) -> socket.socket:
    """Connects to process 0, which may start later; raises PeerLostError if it does not answer in time.

    Args:
        address: HOST:PORT of process 0.
        secret: of this start.
        hello: what process 0 must know of this one.
        join_s: longest wait.
        name: of this process, for messages.
    """
    deadline_s = time.monotonic() + join_s
    while True:
        limit_s = min(HELLO_S, max(RETRY_S, deadline_s - time.monotonic()))
        try:
            with ExitStack() as unless_known:
                channel = unless_known.enter_context(socket.create_connection(_split(address), timeout=limit_s))
                knock(channel, secret, hello, limit_s)
                unless_known.pop_all()
                return channel
        except UnicodeError:  # the name of a host as IDNA has it
            raise ConfigError(
                f"{address}: no name of a host; correct --coordinator or JAX_COORDINATOR_ADDRESS"
            ) from None
        except (ProtocolError, OtherSecretError) as error:
            fix = "check --coordinator or JAX_COORDINATOR_ADDRESS: another program listens there"
            if isinstance(error, OtherSecretError):
                fix = f"set {SECRET} to the same random text in all processes, or use a root=FOLDER that all share"
            raise ConfigError(f"process 0 at {address}: {error.strerror}; {fix}") from None
        except OSError as error:
            if time.monotonic() >= deadline_s:
                cause = error.strerror or str(error)
                raise PeerLostError(
                    f"process 0 at {address}: no answer to {name} within {join_s:.0f} s ({cause}); check that it has "
                    "started, its address, and that no firewall blocks the port"
                ) from None
        time.sleep(RETRY_S)


def free_port(host: str = "") -> int:
    """Returns a TCP port that nothing on this machine uses now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _split(address: str) -> tuple[str, int]:
    """Splits HOST:PORT; an IPv6 address is in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own."""
    return host.strip("[]") in ("localhost", "::1") or host.startswith("127.")
