"""Runs jobs on an engine, some at once, and hands over each result as it comes."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.prepare.engines import local, on_dask, on_ray, on_spark
from jaxinfra.prepare.engines.call import Engine, InWorker, cores

EngineName = Literal["local", "ray", "dask", "spark"]

_STARTED = {"local": local.started, "ray": on_ray.started, "dask": on_dask.started, "spark": on_spark.started}


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
        Exception: the first that the function or `done` raised, as it is; the other jobs are given up.
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
        with _ended_by_signals() as taken, ExitStack() as stack:
            started = stack.enter_context(_STARTED[engine](most))
            taken()
            _drive(engine, started, function, jobs, done)


@contextmanager
def _ended_by_signals() -> Iterator[Callable[[], None]]:
    """SIGTERM, where nobody answers it, ends the block as an exception does, so that workers are ended.

    Ray and Spark answer signals themselves once they are started. What this gives takes them back.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    during = dict(before)
    if before[signal.SIGTERM] is signal.SIG_DFL:
        during[signal.SIGTERM] = _exit
    try:
        _answer(during)
        yield lambda: _answer(during)
    finally:
        _answer(before)


def _answer(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:  # it was not set by Python, and cannot be
                signal.signal(number, handler)


def _exit(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _drive(
    name: str, engine: Engine, function: Callable[[Any], Any], jobs: Sequence[Any], done: Callable[[Any], object]
) -> None:
    waiting = iter(jobs)
    running = {engine.submit(function, job) for job in islice(waiting, engine.workers)}
    while running:
        ended, running = wait(running, return_when=FIRST_COMPLETED)
        outcomes = []
        for future in ended:
            try:
                outcomes.append(future.result())
            except JaxinfraError:
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigError(f"engine={name}: a job was not run ({cause}); look at its workers") from error
        failed = next((outcome for outcome in outcomes if outcome.error is not None), None)
        if not failed:
            running |= {engine.submit(function, job) for job in islice(waiting, len(ended))}
        for outcome in outcomes:
            if outcome.error is None:
                done(outcome.value)
        if failed and failed.error is not None:
            raise failed.error from InWorker(failed.traceback)
