"""Lets only the processes of a start connect: both sides prove that they know its secret, without sending it.

The proofs are HMAC-SHA256 (RFC 2104) over a random number of each side, so that one that was overheard opens nothing.
What follows is neither encrypted nor signed. Without a secret anybody can make the proofs.
"""

import errno
import hmac
import json
import secrets
import socket
import time
from typing import Any

type Json = Any
"""A value that JSON can hold."""

SECRET = "JAXINFRA_SECRET"
"""The variable with the secret of a start."""
HELLO_S = 5.0
"""Longest time until both sides know each other."""
_MAX_BYTES = 4096  # of a line
_GARBAGE = ValueError, RecursionError, TypeError, KeyError


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
    """Shows the secret to who listens, and has it shown; raises OSError if that fails."""
    deadline_s, own = time.monotonic() + limit_s, secrets.token_hex(16)
    try:
        nonces = [own, _read(channel, deadline_s)["nonce"]]
        send_line(channel, {"nonce": own, "hello": hello, "proof": _proof(secret, "client", nonces, hello)})
        is_known = _is_equal(_read(channel, deadline_s)["proof"], _proof(secret, "server", nonces, hello))
    except _GARBAGE:
        raise ProtocolError from None
    if not is_known:
        raise OtherSecretError


def answer(channel: socket.socket, secret: str) -> Json:
    """Returns the hello of who has knocked with the secret; raises OSError for anybody else, within `HELLO_S`."""
    deadline_s, own = time.monotonic() + HELLO_S, secrets.token_hex(16)
    try:
        channel.settimeout(HELLO_S)
        send_line(channel, {"nonce": own})
        shown = _read(channel, deadline_s)
        nonces, hello = [shown["nonce"], own], shown["hello"]
        is_known = _is_equal(shown["proof"], _proof(secret, "client", nonces, hello))
        send_line(channel, {"proof": _proof(secret, "server", nonces, hello) if is_known else None})
    except _GARBAGE:
        raise ProtocolError from None
    if not is_known:
        raise OtherSecretError
    return hello


def _proof(secret: str, side: str, nonces: list[Json], hello: Json) -> str:
    return hmac.new(secret.encode(), json.dumps([side, nonces, hello]).encode(), "sha256").hexdigest()


def _is_equal(shown: Json, proof: str) -> bool:
    return hmac.compare_digest(str(shown).encode(), proof.encode())


def send_line(channel: socket.socket, value: Json) -> None:
    """Sends a value as a line."""
    channel.sendall(json.dumps(value).encode() + b"\n")


def _read(channel: socket.socket, deadline_s: float) -> Json:
    """Reads a line, and no byte of what follows it."""
    line = b""
    while not line.endswith(b"\n"):
        if (left_s := deadline_s - time.monotonic()) <= 0:  # one that sends a byte now and then
            raise TimeoutError(errno.ETIMEDOUT, "does not answer in time")
        channel.settimeout(left_s)
        byte = channel.recv(1)
        if not byte or len(line) == _MAX_BYTES:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        line += byte
    return json.loads(line)
