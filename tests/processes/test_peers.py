"""Processes join, exchange values, and are named if they are missing or do not fit together."""

import json
import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from jaxinfra import __version__
from jaxinfra.errors import CheckpointError, ConfigError, HungError, JaxinfraError, PeerLostError
from jaxinfra.processes import connected_peers, peer_connection
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.join import join
from jaxinfra.processes.peers import Peers, set_current_peers
from jaxinfra.storage.errors import is_storage_error
from jaxinfra.track.jsonl import JsonlTracker
from jaxinfra.track.tracker import MultiTracker
from tests.refusals import names, raises
from tests.several import free_address, one_of

STRANGERS = 200


def connect(
    *members: tuple[int, int], address: str | None = None, hosts: Sequence[str] = (), join_s: float = 60.0
) -> list[Peers | JaxinfraError]:
    """Lets (index, count) of each member join in a thread; returns what it has become."""
    address = address or free_address()

    def join(member: tuple[int, int]) -> Peers | JaxinfraError:
        try:
            return ConnectedPeers(one_of(address, member[1], member[0], hosts), join_s=join_s, silence_s=60.0)
        except JaxinfraError as error:
            return error

    with ThreadPoolExecutor(len(members)) as threads:
        return [*threads.map(join, members)]


def together(peers: Sequence[Peers | JaxinfraError], call) -> list:
    """Calls a function in all processes at the same time."""
    with ThreadPoolExecutor(len(peers)) as threads:
        return [*threads.map(call, peers)]


@pytest.fixture(autouse=True)
def no_forced_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are threads: what would end a process must not end the tests."""
    monkeypatch.setattr(ConnectedPeers, "_end_process", lambda *_: None)
    monkeypatch.setattr(connected_peers, "GRACE_S", 0.5)


@pytest.fixture
def three():
    peers = connect((0, 3), (1, 3), (2, 3))
    yield peers
    together(peers, lambda each: each.leave())


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
    alone.leave(ValueError())


def test_missing_processes_are_named() -> None:
    for error in connect((0, 4), (2, 4), hosts=("a", "b", "c", "d"), join_s=5.0):
        assert isinstance(error, PeerLostError)
        names(str(error), "processes 1 (b), 3 (d) of 4: joined within 5 s;")


def test_a_process_with_another_secret_is_named_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    address, hello = free_address(), {"index": 1, "count": 2, "host": "x", "version": __version__}
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(ConnectedPeers, one_of(address, 2, 0), secret="known", join_s=5.0)
        with raises(ConfigError, f"process 0 {address} another secret JAXINFRA_SECRET"):
            peer_connection.connect(address, "old", hello, 60.0, "x")
        with raises(PeerLostError, "process 1 of 2: joined 127.0.0.1 another secret JAXINFRA_SECRET"):
            first.result()
    names(caplog.messages[0], "127.0.0.1 another JAXINFRA_SECRET")


def test_a_missing_first_process_is_named() -> None:
    address = free_address()
    (error,) = connect((1, 2), address=address, join_s=2.0)
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


def failures(
    peers: Sequence[Peers], errors: Sequence[BaseException | None], *, wait_s: float = 60.0
) -> list[BaseException | None]:
    """Returns how each process ends if its program ends with an error of its own, or waits so long for one's."""

    def leave(pair: tuple[Peers, BaseException | None]) -> BaseException | None:
        try:
            with pair[0]:
                if pair[1] is not None:
                    raise pair[1]
                pair[0].raise_if_lost(wait_s=wait_s)
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(len(peers)) as threads:
        return [*threads.map(leave, zip(peers, errors, strict=True))]


def test_a_program_may_exit_without_an_error() -> None:
    done = SystemExit(0)
    assert failures(connect((0, 2), (1, 2)), (None, done), wait_s=2.0) == [None, done]


def test_the_code_of_an_exit_reaches_the_others() -> None:
    for own, code in (SystemExit(3), 3), (KeyboardInterrupt(), 130):
        told, _ = failures(connect((0, 2), (1, 2)), (None, own))
        assert isinstance(told, JaxinfraError) and told.exit_code == code
        names(str(told), "process 1")


def test_an_error_of_all_processes_is_told_as_each_ones_own() -> None:
    own = KeyError("loss"), KeyError("loss")
    assert failures(connect((0, 2), (1, 2)), own) == [*own]
    told, _ = failures(connect((0, 2), (1, 2)), (None, KeyError("loss")))
    names(str(told), "process 1 KeyError 'loss' test_peers.py fix")


def test_a_failed_collective_operation_is_the_loss_of_a_process() -> None:
    lost = PeerLostError("process 7 (h): was killed")
    failed = CheckpointError("no restore")
    failed.__cause__ = RuntimeError("UNKNOWN: Gloo all-reduce failed")
    told, _ = failures(connect((0, 2), (1, 2)), (failed, lost))
    assert type(told) is PeerLostError


def test_a_run_records_which_process_was_lost(tmp_path: Path) -> None:
    first, second = connect((0, 2), (1, 2))
    assert isinstance(first, Peers) and isinstance(second, Peers)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(second.leave, PeerLostError("process 7 (h): was killed"))
        with (
            raises(PeerLostError, "process 7 killed"),
            first,
            MultiTracker([JsonlTracker(tmp_path)]),
            first.naming_causes(),
        ):
            raise RuntimeError("UNKNOWN: Gloo all-reduce failed")
    recorded = json.loads((tmp_path / "summary.json").read_text())
    assert recorded == {"status": "interrupted", "error": "process 7 (h): was killed"}


def test_a_failed_collective_operation_is_no_failure_of_storage() -> None:
    for cause in "Gloo all-reduce failed", "Failed to send RPC to CoordinationService":
        assert not is_storage_error(type("JaxRuntimeError", (RuntimeError,), {})(f"UNAVAILABLE: {cause}"))
    assert is_storage_error(ValueError("UNAVAILABLE: Error reading s3://bucket/barrier"))


def test_after_the_others_have_been_left() -> None:
    peers = connect((0, 2), (1, 2))
    together(peers, lambda each: each.leave())
    with raises(ConfigError, "process 0 join()"):
        peers[0].gather(None)
    set_current_peers(peers[0])
    try:
        with raises(ConfigError, "join() around all"):
            join()
    finally:
        set_current_peers(Peers())


def member(address: str, index: int, count: int, *messages: dict) -> socket.socket:
    """A process that sends some messages, and then does not read what it gets."""
    hello = {"index": index, "count": count, "host": "x", "version": __version__}
    channel = peer_connection.connect(address, "", hello, 60.0, "x")
    channel.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in messages))
    return channel


def test_a_stopped_process_holds_up_no_others() -> None:
    """The values of a round are more than the connection to it holds."""
    address = free_address()
    with ThreadPoolExecutor(2) as threads:
        joining = [
            threads.submit(ConnectedPeers, one_of(address, 3, index), join_s=60.0, silence_s=20.0) for index in (0, 2)
        ]
        with member(address, 1, 3, {"kind": "value", "round": "main 1", "value": {"value": 0}}):
            peers = [each.result() for each in joining]
            values = [*threads.map(lambda each: each.gather("x" * 10**7), peers)]
            assert [len(each[2]) for each in values] == [10**7] * 2
            for each in peers:
                with raises(HungError, "process 1 silent"):
                    each.raise_if_lost(wait_s=60)
            own = HungError("process 1")
            [*threads.map(lambda each: each.leave(own), peers)]


def test_a_member_that_leaves_out_a_field() -> None:
    address = free_address()
    with ThreadPoolExecutor(1) as threads:
        joining = threads.submit(ConnectedPeers, one_of(address, 2, 0), join_s=60.0)
        with (
            member(address, 1, 2, {"kind": "leave"}),
            raises(PeerLostError, "process 1 protocol"),
            joining.result() as first,
        ):
            first.gather(None)


def test_another_program_at_the_address_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as threads:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        joining = threads.submit(ConnectedPeers, one_of(address, 2, 1), join_s=60.0)
        channel, _ = server.accept()
        with channel:
            channel.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            with raises(ConfigError, f"{address} --coordinator"):
                joining.result()


def test_a_host_whose_name_is_impossible() -> None:
    with raises(ConfigError, "node1..cluster:8476 --coordinator"):
        ConnectedPeers(one_of("node1..cluster:8476", 2, 1), join_s=1.0)


def test_a_value_that_is_too_long(three: list[Peers]) -> None:
    with pytest.raises(ValueError, match="in parts"):
        three[1].gather("x" * 2**24, "long")
    assert together(three, lambda each: each.gather(0)) == [[0] * 3] * 3


def test_strangers_change_nothing() -> None:
    """Whatever they send; also what would have been the hello of a process, with another secret or the wrong proof."""
    address, hello = free_address(), {"index": 1, "count": 2, "host": "x", "version": __version__}
    proof = {"nonce": "0" * 32, "hello": hello, "proof": "0" * 64}
    old = b'{"kind": "hello", "index": 1, "count": 2, "host": "x"}\n'
    garbage = b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"[" * 5000, os.urandom(5000), b"", old
    with ThreadPoolExecutor(2) as threads, ExitStack() as open_until_the_end:
        first = threads.submit(ConnectedPeers, one_of(address, 2, 0), secret="known", join_s=60.0)
        for secret in "", "guessed":
            with raises(ConfigError, f"process 0 {address} another secret JAXINFRA_SECRET root="):
                peer_connection.connect(address, secret, hello, 60.0, "x")
        for sent in *garbage, json.dumps(proof).encode() + b"\n":
            stranger = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60)
            open_until_the_end.enter_context(stranger).sendall(sent)
        second = threads.submit(ConnectedPeers, one_of(address, 2, 1), secret="known", join_s=60.0)
        peers = [first.result(), second.result()]
        assert together(peers, lambda each: each.gather(each.index)) == [[0, 1], [0, 1]]
        together(peers, lambda each: each.leave())


def test_an_odd_hello_without_a_secret_is_no_process() -> None:
    """Without one anybody proves that they know it: what they say is looked at."""
    address, hello = free_address(), {"index": 1, "count": 2, "host": "x", "version": __version__}
    odd = None, [], {}, {**hello, "index": 2}, {**hello, "index": "1"}, {**hello, "host": None}, {**hello, "index": -1}
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ConnectedPeers, one_of(address, 2, 0), join_s=60.0)
        for each in odd:
            peer_connection.connect(address, "", each, 60.0, "x").close()
        peers = [threads.submit(ConnectedPeers, one_of(address, 2, 1), join_s=60.0).result(), first.result()]
        together(peers, lambda each: each.leave())


def test_many_strangers_hold_up_nobody() -> None:
    """They stay, and send nothing or a part; process 0 keeps only so many of them open."""
    address = free_address()
    with ThreadPoolExecutor(2) as threads, ExitStack() as stay:
        first = threads.submit(ConnectedPeers, one_of(address, 2, 0), secret="known", join_s=60.0)
        before = len(os.listdir("/proc/self/fd"))
        hello = {"index": 1, "count": 2, "host": "x", "version": __version__}
        with raises(ConfigError, "another secret"):  # it listens
            peer_connection.connect(address, "", hello, 60.0, "x")
        for number in range(STRANGERS):
            stranger = socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=60)
            stay.enter_context(stranger).sendall(b"{" * (number % 2))
        peers = [
            threads.submit(ConnectedPeers, one_of(address, 2, 1), secret="known", join_s=60.0).result(),
            first.result(),
        ]
        deadline_s = time.monotonic() + 600
        while len(os.listdir("/proc/self/fd")) >= before + STRANGERS + 90:  # a thread closes each that is turned away
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        together(peers, lambda each: each.leave())
