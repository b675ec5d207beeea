"""The local engine: processes of this machine, started afresh and not forked, for the driver has threads.

None of them is left when the engine is closed, and none outlives the driver. `multiprocessing` is not used for them: it
would import the driver's own main module in each, and not say how one died.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.engines.call import ONE_THREAD, Engine, Outcome, python_path

_TRIES = 2


@contextmanager
def started(workers: int | None) -> Iterator[Engine]:
    """Starts workers as they are needed; all end with the context."""
    assert workers is not None
    all_workers, idle = [_Worker() for _ in range(workers)], SimpleQueue["_Worker"]()
    for worker in all_workers:
        idle.put(worker)

    def call(function: Callable[[Any], Any], job: Any) -> Outcome:
        """Has a job done by a worker, and once more by its next process if that dies."""
        worker, how = idle.get(), ""
        try:
            for _ in range(_TRIES):
                try:
                    return worker.call(function, job)
                except (EOFError, OSError):
                    how = worker.ended()
        finally:
            idle.put(worker)
        raise ConfigError(
            f"workers={workers}: a worker {how} while it ran a job, twice; "
            "if memory ran out use fewer workers or smaller pieces"
        )

    def submit(function: Callable[[Any], Any], job: Any) -> Future[Outcome]:
        return threads.submit(call, function, job)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="worker") as threads:
            try:
                yield submit, workers
            finally:
                for worker in all_workers:
                    worker.kill()
    finally:
        for worker in all_workers:
            worker.ended()


class _Worker:
    """A process that is started by its first job, and by the next one after it has died."""

    def __init__(self):
        self._lock, self._closed = threading.Lock(), False
        self._process: subprocess.Popen[bytes] | None = None

    def call(self, function: Callable[[Any], Any], job: Any) -> Outcome:
        """Raises EOFError or OSError when the process is gone."""
        with self._lock:  # a process must not be started while `kill` looks for one
            if self._closed:
                raise ConfigError("the engine is closed")
            if self._process is None:
                self._process, self._connection = _process()
        self._connection.send((function, job))
        return self._connection.recv()

    def kill(self) -> None:
        """Ends the process, whatever it is doing; a thread in `call` sees it gone, and no other is started."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def ended(self) -> str:
        """Closes the connection, waits for the end of the process, and says how it came."""
        with self._lock:
            process, self._process = self._process, None
        if process is None:
            return ""
        self._connection.close()
        code = process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _process() -> tuple["subprocess.Popen[bytes]", Connection]:
    """Starts a process, with a connection to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jaxinfra.prepare.engines.worker", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=os.environ | ONE_THREAD | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
        )
    return process, Connection(ours.detach())
