"""Runs measurements in new processes.

The number of emulated CPU devices is fixed when JAX starts, so each measurement needs a process of its own.
"""

import importlib
import multiprocessing
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.machine.emulation import emulation_env

type Times = dict[str, list[float]]
"""Seconds of each timed round, by side: "jaxinfra", "baseline" or another thing that is compared."""


class BenchmarkProcessError(JaxinfraError):
    """A process that measures, or compares meshes, failed."""


def call_in_process[**P, R](function: Callable[P, R], env: Mapping[str, str], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function in a new process that has these environment variables, too; exceptions reach the caller."""
    with worker_pool(1, env) as pool:
        return _call(pool, function, *args, **kwargs)


def call_without_jax[**P, R](function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function that needs no JAX in a new process, which imports none; exceptions reach the caller."""
    with worker_pool(1, {}, has_jax=False) as pool:
        return _call(pool, function, *args, **kwargs)


def _call[**P, R](pool: ProcessPoolExecutor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return pool.submit(function, *args, **kwargs).result()
    except BrokenProcessPool:
        name = f"{function.__module__}.{function.__name__}"
        raise BenchmarkProcessError(f"the process of {name} died: see its last message above") from None


def worker_pool(num_workers: int, env: Mapping[str, str], *, has_jax: bool = True) -> ProcessPoolExecutor:
    """Returns a pool of new processes that have these environment variables, too, and end when this process ends."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, spawn, initializer=_start_worker, initargs=(env, has_jax))


def _start_worker(env: Mapping[str, str], has_jax: bool) -> None:
    os.environ.update(env)  # before JAX is imported
    if has_jax:
        importlib.import_module("jaxinfra.machine.checked_programs").use_cache()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def emulated_env(num_devices: int) -> dict[str, str]:
    """Returns the environment of a command with emulated CPU devices."""
    return {**os.environ, **emulation_env(num_devices)}


def run_command(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Runs a command and returns its stdout; raises the command's ConfigError, or BenchmarkProcessError."""
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if process.returncode == ConfigError.exit_code:
        raise ConfigError(process.stderr.strip().splitlines()[-1].removeprefix("error: "))
    if process.returncode or not process.stdout.strip():
        raise command_error(command, process.stderr)
    return process.stdout


def command_error(command: Sequence[str], stderr: str) -> BenchmarkProcessError:
    """Returns an error with the last line that the command printed."""
    reason = (stderr.strip().splitlines() or ["no error message"])[-1]
    return BenchmarkProcessError(f"{' '.join(command)} failed: {reason}; run this command alone to see all its output")
