"""Lets only the processes of a start connect: both sides prove that they know its secret, without sending it.

The proofs are HMAC-SHA256 (RFC 2104) over a random number of each side, so that one that was overheard opens nothing. A
stranger has a few seconds and a few bytes, and only so many wait at a time: the one that came first makes room. What
follows is neither encrypted nor signed: a network in which strangers change packets is no place for a run.

Without a secret the proofs are those of an empty one, which anybody can make.
"""

import errno
import hmac
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

type Json = Any
"""A value that JSON can hold."""

SECRET = "JAXINFRA_SECRET"
"""The variable with the secret of a start."""
HELLO_S = 5.0
"""Longest time until both sides know each other."""
RETRY_S = 0.2
"""Time between two attempts to connect."""
_MAX_BYTES, _SPARE = 4096, 64  # of a line of a stranger; strangers that wait beside the processes of the run
_TCP_RTO_MAX_MS = 44  # linux/tcp.h, since Linux 6.15
_LONGEST_RTO_MS, _GIVE_UP_MS, _IDLE_S = 1000, 600_000, 60


class ProtocolError(OSError):
    """The other side sends something else than our messages."""

    def __init__(self) -> None:
        super().__init__(errno.EPROTO, "does not speak jaxinfra's protocol")


class OtherSecretError(OSError):
    """The other side has another secret."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "has another secret")


def new_secret() -> str:
    """Returns a secret that nobody can guess."""
    return secrets.token_hex(32)


def knock(channel: socket.socket, secret: str, hello: Json, limit_s: float) -> None:
    """Shows the secret to a `Door`, and has it shown; OSError if the other side is none, or does not admit this one."""
    deadline_s, own = time.monotonic() + limit_s, secrets.token_hex(16)
    try:
        nonces = [own, _read(channel, deadline_s)["nonce"]]
        _send(channel, {"nonce": own, "hello": hello, "proof": _proof(secret, "client", nonces, hello)})
        shown = _read(channel, deadline_s)["proof"]
    except (ValueError, RecursionError, TypeError, KeyError):
        raise ProtocolError from None
    if not _is_equal(shown, _proof(secret, "server", nonces, hello)):
        raise OtherSecretError
    make_patient(channel)


class Door:
    """Accepts connections in a thread, and hands over each that has shown the secret, in a thread of its own.

    Attributes:
        refused: the addresses that came with another secret.

    Args:
        listener: where it accepts them.
        secret: of this start.
        most: processes that may come at the same time.
        wants: whether to admit a process with this hello now; if not it may try again.
        serve: gets the connection and the hello.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: str,
        most: int,
        wants: Callable[[Json], bool],
        serve: Callable[[socket.socket, Json], object],
    ) -> None:
        self.refused = set[str]()
        self._listener, self._secret, self._most, self._wants, self._serve = listener, secret, most, wants, serve
        self._unknown: dict[socket.socket, None] = {}  # in the order in which they came
        self._lock, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._accept, name="peers-accept", daemon=True).start()

    def close(self) -> None:
        """Accepts no more, a moment later."""
        self._closed.set()

    def _accept(self) -> None:
        self._listener.settimeout(RETRY_S)
        while not self._closed.is_set():
            try:
                channel, (address, *_) = self._listener.accept()
            except OSError:  # none came; or there are too many open files, for a while
                time.sleep(RETRY_S / 10)
                continue
            with self._lock:
                if len(self._unknown) >= self._most + _SPARE:
                    first = next(iter(self._unknown))
                    del self._unknown[first]
                    _hang_up(first)
                self._unknown[channel] = None
            threading.Thread(target=self._meet, args=(channel, address), name="peers-serve", daemon=True).start()
        self._listener.close()

    def _meet(self, channel: socket.socket, address: str) -> None:
        with channel:
            try:
                hello = self._ask(channel, address)
            except (OSError, ValueError, RecursionError, TypeError, KeyError):  # a stranger
                return
            finally:
                with self._lock:
                    self._unknown.pop(channel, None)
            make_patient(channel)
            self._serve(channel, hello)

    def _ask(self, channel: socket.socket, address: str) -> Json:
        """Returns the hello of who knows the secret; raises OSError if it is not wanted, or anything for a stranger."""
        deadline_s, own = time.monotonic() + HELLO_S, secrets.token_hex(16)
        channel.settimeout(HELLO_S)
        _send(channel, {"nonce": own})
        shown = _read(channel, deadline_s)
        nonces, hello = [shown["nonce"], own], shown["hello"]
        if not _is_equal(shown["proof"], _proof(self._secret, "client", nonces, hello)):
            self.refused.add(address)
            _send(channel, {"proof": None})
            raise OtherSecretError
        if not self._wants(hello):
            raise ConnectionRefusedError
        _send(channel, {"proof": _proof(self._secret, "server", nonces, hello)})
        return hello


def make_patient(channel: socket.socket) -> None:
    """Lets a connection outlive a partition, and sends small messages at once.

    TCP sends again each second, and gives up only after ten minutes. By default each wait is twice the last one: after
    a partition of 7 s nothing would come for 12.6 s.
    """
    channel.settimeout(None)
    channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # firewalls forget a connection that says nothing
    if sys.platform == "linux":
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        channel.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GIVE_UP_MS)
        with suppress(OSError):  # an older kernel
            channel.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, _LONGEST_RTO_MS)


def _hang_up(channel: socket.socket) -> None:
    """Closes both directions, and so wakes the thread that reads."""
    with suppress(OSError):  # the other side has closed
        channel.shutdown(socket.SHUT_RDWR)


def _proof(secret: str, side: str, nonces: list[Json], hello: Json) -> str:
    return hmac.new(secret.encode(), json.dumps([side, nonces, hello]).encode(), "sha256").hexdigest()


def _is_equal(shown: Json, proof: str) -> bool:
    return hmac.compare_digest(str(shown).encode(), proof.encode())


def _send(channel: socket.socket, value: Json) -> None:
    channel.sendall(json.dumps(value).encode() + b"\n")


def _read(channel: socket.socket, deadline_s: float) -> Json:
    """Reads a line, and no byte of what follows it."""
    line = b""
    while not line.endswith(b"\n"):
        channel.settimeout(max(0.01, deadline_s - time.monotonic()))
        byte = channel.recv(1)
        if not byte or len(line) == _MAX_BYTES:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        line += byte
    return json.loads(line)
