"""Real processes that cannot join say why in one line, in time, with the code for the supervisor."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from jaxinfra.errors import ConfigError, PeerLostError
from tests.conftest import ROOT
from tests.refusals import names
from tests.several import all_ended, free_address
from tests.tiny_run import Ended, Tiny, ended, start, summary
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

MESH = ("mesh.replica=2", "mesh.fsdp=2")
LIMIT = ("--join-timeout", "3")


def process(
    tiny: Tiny, index: int, address: str, *more: str, of: int = 2, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    where = ("--coordinator", address, "--of", str(of), "--process-id", str(index), "--devices", "cpu:2")
    return start(str(tiny.config), *MESH, "name=joins", *where, *more, env=env)


def error(end: Ended, code: int, *named: str) -> str:
    """Asserts that a process left with a code, and with one line of error."""
    assert end.code == code, end
    (line,) = end.err.splitlines()
    return names(line, "error:", *named)


@contextmanager
def silent_port(*, full: bool) -> Iterator[str]:
    """The address of a server that answers nothing; if it is full, the kernel drops new connections."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0 if full else 8)
        for _ in range(2 if full else 0):
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(server.getsockname())
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_host_that_does_not_resolve(tiny: Tiny) -> None:
    address = "nowhere.invalid:8476"
    error(ended(process(tiny, 1, address, *LIMIT)), PeerLostError.exit_code, address, "process 1", socket.gethostname())


@pytest.mark.parametrize("full", [False, True])
def test_a_host_that_answers_nothing(tiny: Tiny, full: bool) -> None:
    with silent_port(full=full) as address:
        end = ended(process(tiny, 1, address, *LIMIT), timeout_s=600)
    error(end, PeerLostError.exit_code, "process 0", address, "3 s", "process 1")


def test_a_process_that_is_missing(tiny: Tiny) -> None:
    address = free_address()
    limit = ("--join-timeout", "15")  # the two may start that far apart
    for end in all_ended([process(tiny, index, address, *limit, of=3) for index in (0, 2)]):
        error(end, PeerLostError.exit_code, "process 1 of 3", "15 s")


def test_a_port_in_use(tiny: Tiny) -> None:
    with silent_port(full=False) as address:
        first, second = all_ended([process(tiny, index, address, *LIMIT) for index in range(2)])
    error(first, ConfigError.exit_code, address, "in use")
    error(second, PeerLostError.exit_code, address, "process 1")


def test_two_processes_of_one_index(tiny: Tiny) -> None:
    address = free_address()
    for end in all_ended([process(tiny, index, address, of=3) for index in (0, 1, 1)]):
        error(end, ConfigError.exit_code, "process 1", socket.gethostname())


def test_counts_that_differ(tiny: Tiny) -> None:
    address = free_address()
    for end in all_ended([process(tiny, index, address, of=of) for index, of in ((0, 2), (1, 4))]):
        error(end, ConfigError.exit_code, "process 1", "one of 4", "process 0", "one of 2", socket.gethostname())


def test_another_version_of_jaxinfra(tiny: Tiny, tmp_path: Path) -> None:
    copy = tmp_path / "other"
    for name in ("jaxinfra", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    package = copy / "jaxinfra" / "__init__.py"
    package.write_text(package.read_text().replace('__version__ = "', '__version__ = "9.'))
    address = free_address()
    first = process(tiny, 0, address)
    words = [word if first.args[place - 1] != "--process-id" else "1" for place, word in enumerate(first.args)]
    # The folder comes first on the path; `tests`, which the commands of a clone import, is on PYTHONPATH (conftest.py).
    second = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=copy)
    for end in all_ended([first, second]):
        error(end, ConfigError.exit_code, "process 1", "jaxinfra 9.", "process 0", socket.gethostname())


def test_another_version_of_a_package(tiny: Tiny, tmp_path: Path) -> None:
    metadata = tmp_path / "packages" / "numpy-9.9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9.9\n")
    address = free_address()
    path = f"{metadata.parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    other = process(tiny, 1, address, env={"PYTHONPATH": path})
    for end in all_ended([process(tiny, 0, address), other]):
        error(end, ConfigError.exit_code, "process 1", "numpy", "9.9.9", "process 0", socket.gethostname())


SENT = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", os.urandom(4096), b"[" * 100_000 + b"\n", b"{")


def disturb(port: int, stack: ExitStack) -> None:
    """Sends nonsense to a port of this machine, and leaves the connections open."""
    for sent in SENT:
        stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        stranger.sendall(sent)


@pytest.mark.slow(15)
def test_strangers_change_nothing(tiny: Tiny) -> None:
    """At the port where process 0 waits for the others, and at those where it listens while it trains."""
    address = free_address()
    port = int(address.rpartition(":")[2])
    with ExitStack() as stack:
        first = process(tiny, 0, address)
        listening = psutil.Process(first.pid)
        while port not in ports(listening):
            assert first.poll() is None, first.communicate()
        disturb(port, stack)
        second = process(tiny, 1, address)
        while not (tiny.directory("joins") / "run.json").exists():
            assert first.poll() is second.poll() is None
        others = ports(listening)
        assert others, "JAX's service listens"
        for each in others:
            disturb(each, stack)
        ends = all_ended([first, second])
    assert [end.code for end in ends] == [0, 0], ends
    assert all(len(end.err.splitlines()) <= 1 for end in ends), ends
    assert summary(tiny.directory("joins"))["status"] == "finished"


def ports(listening: psutil.Process) -> set[int]:
    return {each.laddr.port for each in listening.net_connections() if each.status == psutil.CONN_LISTEN}
