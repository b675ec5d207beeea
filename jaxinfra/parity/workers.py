"""Calls functions in new processes.

The number of emulated CPU devices is fixed when JAX starts, so what needs another number needs another process.
"""

import importlib
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from jaxinfra.errors import JaxinfraError


class WorkerError(JaxinfraError):
    """A process that compares meshes, or measures, failed."""


def call_in_all[**P, R](
    pools: Sequence[ProcessPoolExecutor], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> list[R]:
    """Calls a function at once in the processes of pools of one, and returns the results in their order."""
    try:
        tasks = [pool.submit(function, *args, **kwargs) for pool in pools]
        return [task.result() for task in tasks]
    except BrokenProcessPool:
        name = f"{function.__module__}.{function.__name__}"
        raise WorkerError(
            f"the process of {name} died: see its last message above; without one, memory was probably too small"
        ) from None


def worker_pool(num_workers: int, env: Mapping[str, str]) -> ProcessPoolExecutor:
    """Returns a pool of new processes that have these environment variables, too, and end when this process ends."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, spawn, initializer=_start_worker, initargs=(env,))


def _start_worker(env: Mapping[str, str]) -> None:
    os.environ.update(env)  # before JAX is imported
    importlib.import_module("jaxinfra.machine.checked_programs").use_cache()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
