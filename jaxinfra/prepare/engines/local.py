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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.engines.call import ONE_THREAD, Engine, Outcome, python_path

_TRIES = 2


@contextmanager
def started(workers: int | None) -> Iterator[Engine]:
    """Starts workers as they are needed; all end with the context."""
    assert workers is not None
    pool = _Pool(workers)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="worker") as threads:
            try:
                yield Engine(submit=partial(threads.submit, pool.call), workers=workers)
            finally:
                pool.kill()
    finally:
        pool.disconnect()


class _Pool:
    """Workers, one for each thread that calls."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._workers: dict[int, _Worker] = {}
        self._closed = False

    def call(self, function: Callable[[Any], Any], job: Any) -> Outcome:
        """Has a job done by the worker of this thread, and once more by a new one if it dies."""
        how = ""
        for _ in range(_TRIES):
            worker = self._own()
            try:
                return worker.call(function, job)
            except (EOFError, OSError):
                how = self._ended(worker)
        raise ConfigError(
            f"workers={self._size}: a worker {how} while it ran a job, twice; "
            "if memory ran out use fewer workers or smaller pieces"
        )

    def kill(self) -> None:
        """Ends all workers, whatever they are doing; the threads that wait for them go on."""
        with self._lock:
            self._closed = True
            for worker in self._workers.values():
                worker.kill()

    def disconnect(self) -> None:
        """Closes what is left when the threads have ended."""
        for worker in self._workers.values():
            worker.ended()

    def _own(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise ConfigError("the engine is closed")
            thread = threading.get_ident()
            if thread not in self._workers:
                self._workers[thread] = _Worker()
            return self._workers[thread]

    def _ended(self, worker: "_Worker") -> str:
        with self._lock:
            del self._workers[threading.get_ident()]
        return worker.ended()


class _Worker:
    """A process, and the connection to it."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "jaxinfra.prepare.engines.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | ONE_THREAD | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
            )
        self._connection = Connection(ours.detach())

    def call(self, function: Callable[[Any], Any], job: Any) -> Outcome:
        """Raises EOFError or OSError when the process is gone."""
        self._connection.send((function, job))
        return self._connection.recv()

    def kill(self) -> None:
        """Ends the process; a thread in `call` sees it gone."""
        self._process.kill()

    def ended(self) -> str:
        """Waits for the end of the process, whose connection is closed, and says how it came."""
        self._connection.close()
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
