"""Only who knows the secret is let in; what a stranger has heard or pretends opens nothing."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from jaxinfra.processes.door import OtherSecretError, ProtocolError, answer, knock


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.processes.door.HELLO_S", 60.0)


class Heard(socket.socket):
    """A connection that a stranger listens to."""

    sent: bytes = b""

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.sent += data
        super().sendall(data, flags)


def meet(secret: str, other: str, hello: Any = 5) -> tuple[Any, bytes]:
    """Returns what who listens has learned, and what the other one has sent; raises the error of the latter."""
    ours, theirs = socket.socketpair()
    with ours, Heard(fileno=theirs.detach()) as heard, ThreadPoolExecutor(1) as threads:
        listening = threads.submit(answer, ours, secret)
        try:
            knock(heard, other, hello, 60.0)
        except OtherSecretError:
            with pytest.raises(OtherSecretError):
                listening.result()
            raise
        return listening.result(), heard.sent


def test_only_who_knows_the_secret_comes_in() -> None:
    found, sent = meet("known", "known", {"index": 1})
    assert found == {"index": 1} and b"known" not in sent
    for other in "", "other", "Known":
        with pytest.raises(OtherSecretError):
            meet("known", other)


def test_what_a_stranger_has_heard_or_makes_up_opens_nothing() -> None:
    _, heard = meet("known", "known")
    made_up = json.dumps({"nonce": "0", "hello": 5, "proof": "0" * 64}).encode() + b"\n"
    for sent, error in (
        (heard, OtherSecretError),
        (made_up, OtherSecretError),
        (b'{"nonce": "0"}\n', ProtocolError),
        (b"[" * 4000 + b"\n", ProtocolError),
        (b"x" * 5000, ConnectionResetError),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(error):
            theirs.sendall(sent)
            answer(ours, "known")


def test_who_only_seems_to_know_the_secret_is_not_believed() -> None:
    for answers, error in (
        ([{"nonce": "0"}, {"proof": "0" * 64}], OtherSecretError),
        ([{"nonce": "0"}, {"proof": None}], OtherSecretError),
        ([{"nonce": "0"}, [1]], ProtocolError),
        ([{"nonce": "0"}, {"proof": "\ud800"}], ProtocolError),
        ([{}], ProtocolError),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in answers))
            with pytest.raises(error):
                knock(ours, "known", 5, 60.0)


def test_who_is_slow_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte at a time, each soon after the last."""
    monkeypatch.setattr("jaxinfra.processes.door.HELLO_S", 0.0)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        theirs.sendall(b'{"nonce": "0", "hello": 5, "proof": "0"}\n')
        answer(ours, "known")
