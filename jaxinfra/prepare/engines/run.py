"""Runs jobs on an engine, some at once, and hands over each result as it comes."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.prepare.engines import local, on_dask, on_ray, on_spark
from jaxinfra.prepare.engines.call import Outcome, cores

EngineName = Literal["local", "ray", "dask", "spark"]

_STARTED = {"local": local.started, "ray": on_ray.started, "dask": on_dask.started, "spark": on_spark.started}


class InWorker(Exception):
    """The cause of an error that a worker raised; its text is the traceback there."""


def run[J, R](
    engine: EngineName,
    function: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int | None,
    done: Callable[[R], object],
) -> None:
    """Applies a function to every job and calls `done` with each result, in this thread, in the order they come.

    With one worker of this machine, or one job, everything is done in this process: there is nothing to do beside
    it, and so errors have their whole traceback and a debugger works. A job whose worker dies is run once more.

    Args:
        engine: `local` starts processes. `ray`, `dask` and `spark` use what `RAY_ADDRESS`, `DASK_SCHEDULER_ADDRESS`,
            `SPARK_REMOTE` or `MASTER` name or what is connected to in this process, and else start workers on this
            machine, which listen on the loopback interface only.
        function: of a module that workers can import.
        jobs: can be pickled, as the results.
        workers: how many jobs are run at once; None is one for each core of this machine or of the cluster.
        done: told each result.

    Raises:
        Exception: the first that the function or `done` raised; the other jobs are given up.
        ConfigError: the engine cannot be started, or a job killed its workers.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: must be 1 or more; use workers=none for one a core")
    if engine == "local":
        workers = min(workers or cores(), len(jobs))
        if workers <= 1:
            for job in jobs:
                done(function(job))
            return
    if jobs:
        most = None if workers is None else min(workers, len(jobs))
        with _ended_by_signals() as taken, _STARTED[engine](most) as (submit, at_once):
            taken()
            waiting = iter(jobs)
            running = {submit(function, job) for job in islice(waiting, at_once)}
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                outcomes = [_outcome(engine, future) for future in ended]
                failed = next((outcome for outcome in outcomes if outcome.error is not None), None)
                if not failed:
                    running |= {submit(function, job) for job in islice(waiting, len(ended))}
                for outcome in outcomes:
                    if outcome.error is None:
                        done(outcome.value)
                if failed and failed.error is not None:
                    raise failed.error from InWorker(failed.traceback)


def _outcome(engine: EngineName, future: Future[Outcome]) -> Outcome:
    try:
        return future.result()
    except JaxinfraError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"engine={engine}: a job was not run ({cause}); look at its workers") from error


@contextmanager
def _ended_by_signals() -> Iterator[Callable[[], None]]:
    """Ends the block on SIGTERM, where nobody answers it, as an exception does, so that workers are ended.

    Ray and Spark answer signals themselves once they are started. What this gives takes them back.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    during = dict(before)
    if before[signal.SIGTERM] is signal.SIG_DFL:
        during[signal.SIGTERM] = lambda number, frame: sys.exit(128 + number)

    def answer(handlers: dict[signal.Signals, Any]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if handler is not None:  # it was not set by Python, and cannot be
                    signal.signal(number, handler)

    try:
        answer(during)
        yield lambda: answer(during)
    finally:
        answer(before)
