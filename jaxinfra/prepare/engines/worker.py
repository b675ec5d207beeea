"""A process of the local engine: `python -m jaxinfra.prepare.engines.worker FD` does the jobs that it is sent.

It ends with the driver, however that ends: a thread sees the end of the connection while a job is running.
"""

import os
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

from jaxinfra.prepare.engines.call import Outcome, call


def _receive(connection: Connection, jobs: SimpleQueue[bytes]) -> None:
    try:
        while True:
            jobs.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def main(descriptor: int) -> None:
    """Answers every (function, job) with its `Outcome`, both pickled, on the socket of a descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to answer
    connection = Connection(descriptor)
    jobs: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, jobs), daemon=True).start()
    while True:
        message = jobs.get()
        try:
            function, job = pickle.loads(message)
        except Exception as error:  # the function cannot be imported here
            outcome = Outcome(error=RuntimeError(f"a worker cannot load the job ({type(error).__name__}: {error})"))
        else:
            outcome = call(function, job)
        try:
            connection.send(outcome)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send(Outcome(error=RuntimeError(f"the result of a job cannot be pickled ({error})")))


if __name__ == "__main__":
    main(int(sys.argv[1]))
