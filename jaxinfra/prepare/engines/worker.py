"""Worker process of the local engine: `python -m jaxinfra.prepare.engines.worker FD` runs the jobs that it receives.

It exits with its driver even while a job runs, because a thread watches the connection.
"""

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

from jaxinfra.prepare.engines.engine import JobResult, run_job
from jaxinfra.processes.signal_router import set_handlers


def _receive(connection: Connection, jobs: SimpleQueue[bytes]) -> None:
    try:
        while True:
            jobs.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def main(descriptor: int) -> None:
    """Receives pickled (function, job) pairs on a socket and answers each with its `JobResult`."""
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


if __name__ == "__main__":
    main(int(sys.argv[1]))
