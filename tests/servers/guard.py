"""Runs a command for as long as the process that started this one lives, however that ends, and not a moment more.

Its standard input is a pipe that its parent holds and never writes to: it closes when the parent is killed, too.
It is in a session of its own, so that a signal to the parent's group does not reach it.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil


def main() -> None:
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    sys.stdin.buffer.read()
    started = psutil.Process(server.pid).children(recursive=True)  # also those in other groups, as of Ray
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(started, timeout=60)


@contextmanager
def guarded(command: Sequence[str], log: Path, *, cwd: Path | None = None) -> Iterator[None]:
    """Runs a server inside the block; what it prints goes to `log`."""
    with log.open("wb") as output:
        guard = subprocess.Popen(
            [sys.executable, __file__, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield
    finally:
        guard.communicate(timeout=600)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that outgoing connections are given."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def wait_until[T](ready: Callable[[], T], expected: tuple[type[Exception], ...], log: Path, timeout_s: float = 60) -> T:
    """Calls until there is no such exception; then returns what the call did."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ready()
        except expected as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"not ready in {timeout_s} s: {error}\n{log.read_text(errors='replace')[-4000:]}"
                ) from error
            time.sleep(0.1)


if __name__ == "__main__":
    main()
