"""The interface of an engine, and how a worker runs a job: it returns an error as a value, with the traceback."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
"""Environment of a worker, because there is a worker for each core already."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """The value that a job returned, or the error that it raised; pickling an error loses the traceback."""

    value: Any = None
    error: Exception | None = None
    traceback: str = ""


class WorkerTraceback(Exception):
    """Carries the traceback in the worker as its message; it is chained to the error as the cause."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Started workers: local processes, or those of Dask, Ray or Spark."""

    # `submit(function, job)` starts `run_job(function, job)` on a worker. Its future raises only errors of the engine
    # itself; an error of the function is in the result.
    submit: Callable[[Callable[[Any], object], Any], Future[JobResult]]
    workers: int  # as many jobs are submitted at a time


def run_job[J](function: Callable[[J], object], job: J) -> JobResult:
    """Runs a job in the process of a worker."""
    os.environ.update(ONE_THREAD)  # libraries read it when they start their first thread
    try:
        return JobResult(value=function(job))
    except Exception as error:
        return JobResult(error=_picklable(error), traceback="".join(traceback.format_exception(error)))


def available_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def driver_python_path() -> str:
    """Returns a PYTHONPATH with which a worker can import what this process can."""
    return os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))


def _picklable(error: Exception) -> Exception:
    """Returns the error, or a RuntimeError with its text if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
