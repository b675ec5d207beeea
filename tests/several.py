"""Starts the processes of a run on this machine, and waits for them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from jaxinfra.processes.discovery import Processes
from tests.tiny_run import Ended, ended, start


def free_address() -> str:
    """An address whose port and the next one are free."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return f"127.0.0.1:{port}"


def one_of(address: str, count: int, index: int, hosts: Sequence[str] = ()) -> Processes:
    """One of several processes that meet at an address."""
    return Processes(
        coordinator=address, count=count, index=index, local_devices=None, source="test", hosts=tuple(hosts)
    )


@contextmanager
def several(
    *arguments: str,
    count: int = 2,
    devices: int = 2,
    indices: Sequence[int] | None = None,
    of: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """Starts one process for each index, all of them by default; none survives the block."""
    address = free_address()
    where = ("--coordinator", address, "--of", str(of or count), "--devices", f"cpu:{devices}")
    children = [start(*arguments, *where, "--process-id", str(index), env=env) for index in indices or range(count)]
    with ending(children):
        yield children


@contextmanager
def several_scripts(code: str, *arguments: str, count: int) -> Iterator[list[subprocess.Popen]]:
    """Starts processes of a Python script that calls `jaxinfra.join()`, with a device each; none survives the block."""
    host, _, port = free_address().rpartition(":")
    where = {"JAX_COORDINATOR_ADDRESS": f"{host}:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_NUM_CPU_DEVICES": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **where, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(count)
    ]
    with ending(children):
        yield children


@contextmanager
def ending(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    """Kills what is left of processes at the end of the block."""
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()
            for pipe in filter(None, (child.stdout, child.stderr)):
                pipe.close()


def all_ended(children: Sequence[subprocess.Popen]) -> list[Ended]:
    return [ended(child) for child in children]
