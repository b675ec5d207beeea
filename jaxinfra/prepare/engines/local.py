"""Local engine: worker processes on this machine, spawned and not forked, because the driver has threads.

No worker outlives the engine or the driver. Pools of `multiprocessing` are not used, because they import the driver's
main module in each worker, and do not say how a worker died.
"""

import os
import pickle
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
from queue import SimpleQueue

import cloudpickle

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.engines.engine import ONE_THREAD, Engine, JobResult, driver_python_path, run_job
from jaxinfra.processes.signal_router import set_handlers

_TRIES = 2


@contextmanager
def start_local(workers: int | None) -> Iterator[Engine]:
    """Starts workers when they are needed, and ends them with the context."""
    assert workers is not None
    pool = _Pool(workers)
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="worker") as threads:
            try:
                yield Engine(submit=partial(threads.submit, pool.run), workers=workers)
            finally:
                pool.kill()  # leaving the thread pool waits for its threads, and so for their workers
    finally:
        pool.close()


class _Pool:
    """Worker processes. Each thread of the engine starts one and waits while it runs a job."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._workers: dict[int, _Worker] = {}  # by thread
        self._closed = False

    def run[J](self, function: Callable[[J], object], job: J) -> JobResult:
        """Runs a job on the worker of this thread, and once more on a new one if it dies."""
        end = ""  # how the last worker ended, such as "was killed by SIGKILL"
        for _ in range(_TRIES):
            worker = self._worker_of_thread()
            try:
                return worker.run(function, job)
            except (EOFError, OSError):
                with self._lock:
                    del self._workers[threading.get_ident()]
                end = worker.close()
        raise ConfigError(
            f"workers={self._size}: a worker {end} while it ran a job, twice; "
            "if memory ran out, use fewer workers or a smaller shard_bytes"
        )

    def kill(self) -> None:
        """Kills all workers; a thread that waits for one gets an EOFError or OSError."""
        with self._lock:
            self._closed = True
            for worker in self._workers.values():
                worker.kill()

    def close(self) -> None:
        """Waits for the workers that are left, when all threads have ended."""
        for worker in self._workers.values():
            worker.close()

    def _worker_of_thread(self) -> "_Worker":
        with self._lock:
            if self._closed:
                raise ConfigError("the engine is closed")
            thread = threading.get_ident()
            if thread not in self._workers:
                self._workers[thread] = _Worker()
            return self._workers[thread]


class _Worker:
    """A worker process and the connection to it."""

    def __init__(self):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=os.environ | ONE_THREAD | {"PYTHONPATH": driver_python_path(), "PYTHONUNBUFFERED": "1"},
            )
        self._connection = Connection(ours.detach())

    def run[J](self, function: Callable[[J], object], job: J) -> JobResult:
        """Runs a job; EOFError or OSError if the process is gone."""
        # Not `pickle`: a job may hold classes of a recipe file, which a worker cannot import.
        self._connection.send_bytes(cloudpickle.dumps((function, job)))
        return self._connection.recv()

    def kill(self) -> None:
        """Kills the process."""
        self._process.kill()

    def close(self) -> str:
        """Waits for the end of the process and says how it ended."""
        self._connection.close()
        code = self._process.wait()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def serve(descriptor: int) -> None:
    """Receives pickled (function, job) pairs on a socket and answers each with its `JobResult`; runs in a worker.

    It exits with its driver even while a job runs, because a thread watches the connection.
    """
    set_handlers({signal.SIGINT: signal.SIG_IGN})  # the driver handles Ctrl-C
    connection = Connection(descriptor)
    jobs: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while True:
        message = jobs.get()
        try:
            function, job = pickle.loads(message)
        except Exception as error:  # the function cannot be imported here
            result = JobResult(error=RuntimeError(f"a worker cannot load the job ({type(error).__name__}: {error})"))
        else:
            result = run_job(function, job)
        try:
            connection.send(result)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send(JobResult(error=RuntimeError(f"the result of a job cannot be pickled ({error})")))


def _receive(connection: Connection, jobs: SimpleQueue[bytes]) -> None:
    try:
        while True:
            jobs.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)
