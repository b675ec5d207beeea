"""Engines run the jobs of preparing data: on processes of this machine, or on Ray, Dask or Spark.

    run_jobs("local", tokenize_job, jobs, workers=8, on_result=add)

All engines give the same results, because a job depends only on its own fields and may run twice if its worker dies.
Workers of a cluster need the same file system and the same packages as the driver.

joblib's backends break these promises (joblib 1.6, Ray 2.60, Dask 2026.8, joblibspark 0.6): Ray and Spark give no
result before the last one, Spark fails on Spark 4, Dask waits forever if a job kills its worker, and loky's workers
outlive a killed driver.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, Literal

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.prepare.engines.engine import Engine, WorkerTraceback, available_cores
from jaxinfra.prepare.engines.local import start_local
from jaxinfra.prepare.engines.on_dask import start_dask
from jaxinfra.prepare.engines.on_ray import start_ray
from jaxinfra.prepare.engines.on_spark import start_spark
from jaxinfra.processes.signal_router import set_handlers

EngineName = Literal["local", "ray", "dask", "spark"]

_STARTERS = {"local": start_local, "ray": start_ray, "dask": start_dask, "spark": start_spark}


def run_jobs[J, R](
    engine: EngineName,
    function: Callable[[J], R],
    jobs: Sequence[J],
    *,
    workers: int | None,
    on_result: Callable[[R], object],
) -> None:
    """Applies a function to every job and calls `on_result` in this thread, in the order in which results arrive.

    One local worker, or a single local job, runs in this process, so that errors keep their traceback and a debugger
    works. A job whose worker dies runs once more. Workers must be able to import the function; jobs and results are
    pickled. `workers` jobs run at once, None is one per core of the machine or the cluster.

    `ray`, `dask` and `spark` use the cluster that `RAY_ADDRESS`, `DASK_SCHEDULER_ADDRESS`, `SPARK_REMOTE` or `MASTER`
    names or this process is connected to; otherwise they start workers on the loopback interface of this machine.

    Raises:
        Exception: the first error of `function` or `on_result`, unchanged; the other jobs are abandoned.
        ConfigError: the engine cannot be started, or a job killed its workers.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: must be at least 1; use workers=none for one per core")
    if not jobs:
        return
    if engine == "local":
        workers = workers or available_cores()
    workers = None if workers is None else min(workers, len(jobs))
    if engine == "local" and workers == 1:
        for job in jobs:
            on_result(function(job))
        return
    with _sigterm_as_exception() as restore_handlers, ExitStack() as stack:
        started = stack.enter_context(_STARTERS[engine](workers))
        restore_handlers()  # Ray and Spark install their own when they start
        _run_on(started, engine, function, jobs, on_result)


@contextmanager
def _sigterm_as_exception() -> Iterator[Callable[[], None]]:
    """Turns SIGTERM into SystemExit, unless it is handled already, so that `with` blocks end the workers.

    Yields a function that installs the handlers again.
    """
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    during = dict(before)
    if before[signal.SIGTERM] is signal.SIG_DFL:
        during[signal.SIGTERM] = lambda number, frame: sys.exit(128 + number)
    try:
        set_handlers(during)
        yield lambda: set_handlers(during)
    finally:
        set_handlers(before)


def _run_on[J, R](
    engine: Engine, name: str, function: Callable[[J], R], jobs: Sequence[J], on_result: Callable[[R], object]
) -> None:
    """Submits the jobs, but only as many as run at once, so that an error abandons the others."""
    waiting = iter(jobs)
    running = {engine.submit(function, job) for job in islice(waiting, engine.workers)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        results = []
        for future in done:
            try:
                results.append(future.result())
            except JaxinfraError:
                raise
            except Exception as error:
                cause = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise ConfigError(f"engine={name}: a job was not run ({cause}); check its workers") from error
        failed = next((result for result in results if result.error is not None), None)
        if failed is None:  # before `on_result`, so that workers are not idle meanwhile
            running |= {engine.submit(function, job) for job in islice(waiting, len(done))}
        for result in results:
            if result.error is None:
                on_result(result.value)
        if failed is not None and failed.error is not None:  # after the results that did arrive
            raise failed.error from WorkerTraceback(failed.traceback)
