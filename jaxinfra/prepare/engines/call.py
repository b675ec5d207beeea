"""What a worker does with a job, on every engine: its error comes back as a value, with its type and its traceback."""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
"""Environment of a worker: there are as many workers as cores already."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Holds what a job returned or raised, with the traceback, which is lost when an error is pickled."""

    value: Any = None
    error: Exception | None = None
    traceback: str = ""


class InWorker(Exception):
    """The cause of an error that a worker raised; its text is the traceback there."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Workers that were started.

    Attributes:
        submit: begins `call(function, job)` on one of them; its future raises only what is wrong with the engine.
        workers: how many jobs it is given at once.
    """

    submit: Callable[[Callable[[Any], Any], Any], Future[Outcome]]
    workers: int


def call(function: Callable[[Any], Any], job: Any) -> Outcome:
    """Runs a job in the process of a worker."""
    os.environ.update(ONE_THREAD)  # read when the first thread is started
    try:
        return Outcome(value=function(job))
    except Exception as error:
        return Outcome(error=_portable(error), traceback="".join(traceback.format_exception(error)))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def python_path() -> str:
    """What PYTHONPATH must be for another process to import what this one can."""
    return os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))


def _portable(error: Exception) -> Exception:
    """The error, of another type if it cannot be sent as it is."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
