"""Bytes from process to process: both ways at once, and neither a stranger nor a process that is killed confuses it."""

import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from jaxinfra.processes import door
from jaxinfra.processes.exchange import Exchange


class Pair:
    """Stands for the peers of two processes in this one: each call of a thread waits for that of the other."""

    def __init__(self) -> None:
        self._barrier, self._values = threading.Barrier(2, timeout=600), [None, None]

    def peers(self, index: int) -> Any:
        def gather(value: Any) -> list[Any]:
            self._values[index] = value
            self._barrier.wait()
            values = json.loads(json.dumps(self._values))
            self._barrier.wait()
            return values

        addresses = ("127.0.0.1", "127.0.0.1")
        return SimpleNamespace(
            index=index, addresses=addresses, gather=gather, broadcast=lambda value: gather(value)[0]
        )


def test_both_send_at_once_and_strangers_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, contents = Pair(), [os.urandom(5_000_000), b""]  # more than the sockets buffer
    silent: list[socket.socket] = []
    monkeypatch.setattr(door, "HELLO_S", 2.0)

    def run(index: int) -> list[list[Any]]:
        with Exchange(pair.peers(index)) as link:
            for _, port in link._addresses:
                for said in (b"GET / HTTP/1.1\r\n\r\n", b"", b"x" * 1000):
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(said)
                silent.append(socket.create_connection(("127.0.0.1", port)))  # it stays, and says nothing
            other, found = 1 - index, []
            for _ in range(2):
                parcels = [([index, number], content) for number, content in enumerate(contents)]
                found.append(sorted(link.swap({other: parcels}, [other])))
            assert [*link.swap({}, [])] == []
            pair.peers(index).gather(None)
            return found

    with ThreadPoolExecutor(2) as pool:
        for index, found in enumerate(pool.map(run, range(2))):
            assert found == [[([1 - index, number], content) for number, content in enumerate(contents)]] * 2
    for each in silent:
        each.close()


def test_a_process_that_breaks_off_is_an_error_of_the_connection() -> None:
    pair = Pair()

    def breaks_off() -> Any:
        yield ["one", b"1"]
        raise OSError("killed")

    def run(index: int) -> None:
        with Exchange(pair.peers(index)) as link:
            if index == 0:
                with pytest.raises(OSError, match="killed"):
                    [*link.swap({1: breaks_off()}, [])]
            else:
                with pytest.raises(ConnectionResetError):
                    [*link.swap({}, [0])]

    with ThreadPoolExecutor(2) as pool:
        [*pool.map(run, range(2))]
