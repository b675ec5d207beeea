"""Processes join, exchange values, and are named if they are missing or do not fit together."""

import json
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxinfra.errors import ConfigError, JaxinfraError, PeerLostError
from jaxinfra.runtime.peers import ConnectedPeers, Peers
from tests.refusals import names, raises
from tests.several import free_address


def connect(
    *members: tuple[int, int], address: str | None = None, hosts: Sequence[str] = ()
) -> list[Peers | JaxinfraError]:
    """Lets (index, count) of each member join in a thread; returns what it has become."""
    address = address or free_address()

    def join(member: tuple[int, int]) -> Peers | JaxinfraError:
        try:
            return ConnectedPeers(address, member[1], member[0], join_s=2.0, silence_s=30.0, known_hosts=hosts)
        except JaxinfraError as error:
            return error

    with ThreadPoolExecutor(len(members)) as threads:
        return [*threads.map(join, members)]


def together(peers: Sequence[Peers | JaxinfraError], call) -> list:
    """Calls a function in all processes at the same time."""
    with ThreadPoolExecutor(len(peers)) as threads:
        return [*threads.map(call, peers)]


@pytest.fixture
def three():
    peers = connect((0, 3), (1, 3), (2, 3))
    yield peers
    together(peers, lambda each: each.close())


def test_values_reach_all(three: list[Peers]) -> None:
    assert [each.index for each in three] == [0, 1, 2]
    assert together(three, lambda each: each.gather({"of": each.index})) == [[{"of": 0}, {"of": 1}, {"of": 2}]] * 3
    assert together(three, lambda each: each.broadcast(each.index + 7)) == [7, 7, 7]
    assert together(three, lambda each: each.gather("x" * 10**6)) == [["x" * 10**6] * 3] * 3


def test_a_value_that_differs_is_named(three: list[Peers]) -> None:
    def check(peers: Peers) -> str:
        with raises(ConfigError, "process 2 numpy 2.1 2.0 process 0") as caught:
            peers.require_equal({"jax": "0.9", "numpy": "2.1" if peers.index == 2 else "2.0"})
        return str(caught.value)

    assert len(set(together(three, check))) == 1


def test_a_run_of_one_is_alone() -> None:
    alone = Peers()
    assert (alone.index, alone.count, alone.gather(5), alone.broadcast(6)) == (0, 1, [5], 6)
    alone.require_equal({"jax": "0.9"})
    alone.raise_if_lost(wait_s=60)
    alone.close(ValueError())


def test_missing_processes_are_named() -> None:
    for error in connect((0, 4), (2, 4), hosts=("a", "b", "c", "d")):
        assert isinstance(error, PeerLostError)
        names(str(error), "processes 1 (b), 3 (d) of 4: joined within 2 s;")


def test_a_missing_first_process_is_named() -> None:
    address = free_address()
    (error,) = connect((1, 2), address=address)
    assert isinstance(error, PeerLostError)
    names(str(error), f"process 0 {address} refused firewall")


def test_processes_that_do_not_fit_together_are_named() -> None:
    for members, named in (((0, 3), (1, 3), (1, 3)), "process 1: host index"), (((0, 2), (1, 4)), "process 1 4 2"):
        for error in connect(*members):
            assert isinstance(error, ConfigError), error
            names(str(error), named)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (error,) = connect((0, 1), address=address)
    assert isinstance(error, ConfigError)
    names(str(error), f"{address} in use another port")


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"[1]\n",
        b'{"kind": "value"}\n',
        b"",
        json.dumps({"kind": "hello", "index": 9, "count": 2, "host": "x"}).encode() + b"\n",
    ],
)
def test_strangers_change_nothing(sent: bytes) -> None:
    address = free_address()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ConnectedPeers, address, 2, 0, join_s=20.0)
        while True:
            try:
                stranger = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5)
                break
            except ConnectionRefusedError:
                continue
        with stranger:
            stranger.sendall(sent)
            second = threads.submit(ConnectedPeers, address, 2, 1, join_s=20.0)
            peers = [first.result(), second.result()]
    assert together(peers, lambda each: each.gather(each.index)) == [[0, 1], [0, 1]]
    together(peers, lambda each: each.close())
