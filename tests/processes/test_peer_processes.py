"""Real processes that are stopped, refused, or end their scripts; they use no devices, so that they start at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxinfra.errors import ConfigError, HungError, PeerLostError, Preempted
from tests.conftest import ROOT
from tests.refusals import names
from tests.several import all_ended, free_address
from tests.tiny_run import ended

HEAD = """\
import os, signal, sys, time
from jaxinfra.errors import JaxinfraError
from jaxinfra.processes import join
from jaxinfra.processes import connected_peers
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.discovery import Processes
connected_peers.GRACE_S = 0.5
address, index, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    found = Processes(coordinator=address, count=count, index=index, local_devices=None, source="test")
    peers = ConnectedPeers(found, join_s=20.0, silence_s=3.0)
except JaxinfraError as error:
    print("error:", error, file=sys.stderr)
    sys.exit(error.exit_code)
join._END_S = 1.0
join.leave_at_exit(peers)
print("up", flush=True)
"""

type Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process INDEX of COUNT whose script goes on with some code."""
    children, address = [], free_address()

    def start(code: str, index: int, count: int, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        script = tmp_path / f"script-{len(children)}.py"
        script.write_text(HEAD + code)
        words = [sys.executable, str(script), address, str(index), str(count)]
        children.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


def are_up(*children: subprocess.Popen[str]) -> None:
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n", child.communicate()


WAIT = "time.sleep(1000)\n"
SLOW = "fail = peers._fail\npeers._fail = lambda error, joined, grace_s=3.0: fail(error, joined, grace_s + 1)\n"


def test_process_0_leaves_last_and_needs_no_standard_error(start: Start) -> None:
    """JAX's service ends with it, and would abort the others. The one that was stopped learns why they have left."""
    reader, writer = os.pipe()
    first = start(WAIT, 0, 3, stderr=writer)
    second, third = start(SLOW + WAIT, 1, 3), start(WAIT, 2, 3)
    are_up(first, second, third)
    os.close(writer)
    os.close(reader)
    third.send_signal(signal.SIGSTOP)
    end = ended(second)
    assert end.code == HungError.exit_code
    names(end.err.splitlines()[-1], "process 2 silent")
    assert ended(first).code == HungError.exit_code
    third.send_signal(signal.SIGCONT)
    end = ended(third)
    assert end.code == HungError.exit_code
    names(end.err.splitlines()[-1], "process 2 silent")


def test_a_refusal_reaches_all(start: Start) -> None:
    for end in all_ended([start("", 0, 3), start("", 2, 3), start("", 1, 2)]):
        assert end.code == ConfigError.exit_code, end
        names(end.err.removesuffix("\n"), "process 1 one of 2")


def test_a_script_whose_peer_is_killed_says_so(start: Start) -> None:
    failed = "time.sleep(1)\nraise RuntimeError('UNKNOWN: Gloo all-reduce failed')"
    end, _ = all_ended([start(failed, 0, 2), start("os.kill(os.getpid(), signal.SIGKILL)", 1, 2)])
    assert end.code == PeerLostError.exit_code, end
    names(end.err.removesuffix("\n"), "process 1 killed")


def test_an_error_of_a_script_ends_all(start: Start) -> None:
    first, second = all_ended([start(WAIT, 0, 2), start("{}['loss']", 1, 2)])
    assert (first.code, second.code) == (ConfigError.exit_code, ConfigError.exit_code)
    names(first.err.removesuffix("\n"), "process 1 KeyError script-1.py fix")
    assert second.err.startswith("Traceback")


def test_a_script_that_exits_early_ends_all(start: Start) -> None:
    first, second = all_ended([start(WAIT, 0, 2), start("sys.exit(3)", 1, 2)])
    assert (first.code, second.code) == (PeerLostError.exit_code, PeerLostError.exit_code)
    names(first.err.removesuffix("\n"), "process 1 ended")


def test_a_process_that_hangs_after_its_last_save_ends_as_the_others(start: Start) -> None:
    """Its watchdog ends it, and the others do not wait for it."""
    saved = "from jaxinfra.errors import Preempted\nsaved = Preempted('runs/x: saved')\n"
    hangs = (
        f"{saved}import threading\npeers.settled = saved\nthreading.Timer(0, peers.end_hung, ['end']).start()\n{WAIT}"
    )
    first, second = all_ended([start(hangs, 0, 2), start(f"{saved}raise saved\n", 1, 2)])
    assert (first.code, second.code) == (Preempted.exit_code, Preempted.exit_code), (first, second)
    names(first.err.removesuffix("\n"), "runs/x: saved; left without waiting for MainThread script-0.py")
    assert second.err == "error: runs/x: saved\n"


def test_a_request_before_the_first_step_needs_no_standard_error(start: Start) -> None:
    code = """\
from jaxinfra.processes.requests import RunSignals
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(writer)
os.close(reader)
with RunSignals(peers) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1000)
"""
    assert ended(start(code, 0, 1)).code == Preempted.exit_code


JOINING = """\
import os, sys, time
from jaxinfra.processes import join
from jaxinfra.processes.peers import current_peers
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.requests import RunSignals

def connect_devices(*arguments):
    if os.environ["PLACE"] == "joining":
        print("up", flush=True)
        time.sleep(1000)

join._connect_devices = connect_devices
found = Processes(coordinator=sys.argv[1], count=2, index=int(sys.argv[2]), local_devices=None, source="test")
if os.environ["PLACE"] == "joining":
    with RunSignals():
        join.join(found)
join.join(found)
print("up", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("place", ["joining", "joined"])
def test_a_signal_outside_of_a_training_stops_all(place: str) -> None:
    """While the devices are being connected, and in a script that has no handler of its own."""
    address, pipe = free_address(), subprocess.PIPE
    children = [
        subprocess.Popen(
            [sys.executable, "-c", JOINING, address, str(index)],
            stdout=pipe,
            stderr=pipe,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PLACE": place},
        )
        for index in range(2)
    ]
    are_up(*children)
    children[1].send_signal(signal.SIGTERM)
    for end in all_ended(children):
        assert (end.code, end.err) == (Preempted.exit_code, end.err.splitlines()[0] + "\n"), end
        names(end.err.removesuffix("\n"), "SIGTERM to process 1")
