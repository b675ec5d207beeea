"""Strangers do not come through a door, and hold up nobody, however many they are."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import Any

import pytest

from jaxinfra.runtime.door import Door, OtherSecretError, ProtocolError, knock

STRANGERS = 200


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxinfra.runtime.door.HELLO_S", 60.0)


@contextmanager
def opened(secret: str = "known") -> Iterator[tuple[tuple[str, int], SimpleQueue[Any]]]:
    """A door for four processes, which does not want "late" ones: its address, and the hellos of those it let in."""
    came = SimpleQueue[Any]()
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    door = Door(listener, secret, 4, lambda hello: hello != "late", lambda channel, hello: came.put(hello))
    yield address, came
    door.close()


def dial(address: tuple[str, int], secret: str, hello: Any) -> None:
    with socket.create_connection(address, timeout=30) as channel:
        knock(channel, secret, hello, 30.0)


def test_only_who_knows_the_secret_comes_in() -> None:
    with opened() as (address, came):
        for secret in "", "other", "Known":
            with pytest.raises(OtherSecretError):
                dial(address, secret, {"index": 0})
        with pytest.raises(ConnectionResetError):
            dial(address, "known", "late")
        dial(address, "known", {"index": 1})
        assert came.get(timeout=30) == {"index": 1} and came.empty()


class Heard(socket.socket):
    """A connection that a stranger listens to."""

    sent: bytes = b""

    def sendall(self, data: Any, flags: int = 0) -> None:
        self.sent += data
        super().sendall(data, flags)


def test_what_a_stranger_has_heard_opens_nothing() -> None:
    with opened() as (address, came):
        with Heard() as channel:
            channel.connect(address)
            knock(channel, "known", 5, 30.0)
        assert came.get(timeout=30) == 5 and b"known" not in channel.sent
        with socket.create_connection(address, timeout=30) as stranger, stranger.makefile() as answers:
            stranger.sendall(channel.sent)
            assert "nonce" in json.loads(answers.readline())
            assert json.loads(answers.readline()) == {"proof": None}
        assert came.empty()


def test_who_only_seems_to_be_a_door_is_not_believed() -> None:
    for answers, error in (
        ([{"nonce": "0"}, {"proof": "0" * 64}], OtherSecretError),
        ([{"nonce": "0"}, {"proof": None}], OtherSecretError),
        ([{"nonce": "0"}, [1]], ProtocolError),
        ([{}], ProtocolError),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in answers))
            with pytest.raises(error):
                knock(ours, "known", 5, 30.0)


def test_many_strangers_hold_up_nobody() -> None:
    """Each sends something else, or nothing, and stays; the door keeps only so many of them open."""
    sent = b"", b"{", b"GET / HTTP/1.1\r\n\r\n", b"[" * 4000 + b"\n", os.urandom(5000)
    with opened() as (address, came), ExitStack() as stay:
        before = len(os.listdir("/proc/self/fd"))
        for number in range(STRANGERS):
            stranger = stay.enter_context(socket.create_connection(address, timeout=30))
            stranger.sendall(sent[number % len(sent)])
        dial(address, "known", 7)
        assert came.get(timeout=30) == 7
        assert len(os.listdir("/proc/self/fd")) < before + STRANGERS + 80
