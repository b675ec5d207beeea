"""Rows 44 and 45: packets that are lost between two hosts, and strangers at the port of process 0."""

import os
import resource
import signal
import socket
import time
from contextlib import ExitStack, suppress

from jaxinfra import __version__
from jaxinfra.errors import ConfigError, HungError, PeerLostError
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.processes.peer_connection import connect, free_port
from tests.bench.slow_link import SlowLink, address_of
from tests.faults.harness import Harness, NotSurvived, NotTried, require, until, wait
from tests.faults.matrix import row

_LOST = {PeerLostError.exit_code, HungError.exit_code}
_SENT = b"", b"{", b"GET / HTTP/1.1\r\n\r\n", b"[" * 4000 + b"\n", os.urandom(5000)  # by strangers


@row(
    44,
    fault="packets lost in both directions for less than the heartbeat; in one direction, in both, for good",
    must="no effect; then 76 or 77 on every process, 134 where JAX aborts one first; same bits after the restart",
)
def lost_packets(harness: Harness) -> str:
    """Trains on two hosts of this machine, and loses packets between them."""
    name, ends = "packets", list[str]()
    heartbeat_s, short_s, losses = (30, 8, ((1,), (0,), (0, 1))) if harness.is_long else (12, 3, ((1,),))
    for lost in losses:
        try:
            codes = _lose(harness, name, lost, heartbeat_s, short_s)
        except ConfigError as error:  # no network namespaces
            raise NotTried(str(error)) from None
        # On a busy machine process 0 may leave before another one has: with it ends JAX's service, which aborts that.
        require(codes[0] in _LOST and codes[1] in {*_LOST, -signal.SIGABRT}, f"{codes} after losing those of {lost}")
        ends.append(f"{codes[0]} and {codes[1]} once those of {' and '.join(map(str, lost))} are lost for good")
    ended = harness.train(name, processes=2)
    require(ended.code == 0, ended)
    return f"goes on after {short_s} s without packets; {', '.join(ends)}; {harness.same_bits(name)}"


def _lose(harness: Harness, name: str, lost: tuple[int, ...], heartbeat_s: int, short_s: float) -> list[int]:
    """Returns the exit codes of both processes."""
    run = harness.run(name)
    where = f"--coordinator={address_of(0)}:8476", "--of=2", f"--heartbeat-timeout={heartbeat_s}"
    with SlowLink(delay_s=0.0, bits_per_s=1e9) as link, ExitStack() as stack:
        options = {"fail": "step:0:*:sleep=0.1", "env": {SECRET: new_secret()}, "start": link.start}
        children = [
            stack.enter_context(harness.started(name, *where, f"--process-id={index}", **options)) for index in (0, 1)
        ]
        for _ in range(2):
            done = len(run.losses())
            until(lambda done=done: len(run.losses()) > done + 2, children[0])
            link.lost_from = 0, 1
            time.sleep(short_s)
            link.lost_from = ()
        link.lost_from = lost
        return [wait(child).code for child in children]


@row(
    45,
    fault="strangers at the port: garbage, many connections that stay, the hello of a process without the secret",
    must="no effect; the hello is refused; same bits",
)
def strangers(harness: Harness) -> str:
    """Disturbs process 0 while it waits for the other one; while it trains the port is closed."""
    name, number, address = "strangers", 10_000 if harness.is_long else 300, ("127.0.0.1", free_port())
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    where = f"--coordinator=127.0.0.1:{address[1]}", "--of=2"
    run, env = harness.run(name), {SECRET: new_secret()}
    with ExitStack() as stack:
        first = stack.enter_context(harness.started(name, *where, "--process-id=0", env=env, fail="step:0:8:sleep=1"))
        until(lambda: _listens(address), first)
        _disturb(address, number, stack)
        second = stack.enter_context(harness.started(name, *where, "--process-id=1", env=env))
        until(lambda: len(run.losses()) > 4, first)
        require(not _listens(address), "the port is open while the run trains")
        ends = [wait(child) for child in (first, second)]
    require([each.code for each in ends] == [0, 0], "; ".join(map(str, ends)))
    text = harness.same_bits(name, harness.reference(processes=2, devices=2))
    return f"{number:,} connections, none of them admitted; {text}"


def _listens(address: tuple[str, int]) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(address):
        return True
    return False


def _disturb(address: tuple[str, int], number: int, stack: ExitStack) -> None:
    """Connects so many times, and claims to be process 1; raises NotSurvived if that is believed."""
    for index in range(number):
        stranger = stack.enter_context(socket.create_connection(address, timeout=60))
        with suppress(ConnectionError):  # it was shown the door
            stranger.sendall(_SENT[index % len(_SENT)])
    hello = {"index": 1, "count": 2, "host": "stranger", "version": __version__}
    with suppress(ConfigError):  # which names the other secret
        connect(f"{address[0]}:{address[1]}", "", hello, 60.0, "a stranger")
        raise NotSurvived("a hello without the secret was believed")
