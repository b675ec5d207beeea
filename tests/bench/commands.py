"""Runs the commands and functions that a benchmark times, each in a new process.

The number of emulated CPU devices is fixed when JAX starts, so each measurement needs a process of its own.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import PIPE

from jaxinfra.errors import ConfigError
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.parity.workers import WorkerError, call_in_all, worker_pool

type Times = dict[str, list[float]]
"""Seconds of each timed round, by side: "jaxinfra", "baseline" or another thing that is compared."""


def call_in_process[**P, R](function: Callable[P, R], env: Mapping[str, str], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function in a new process that has these environment variables, too; exceptions reach the caller."""
    with worker_pool(1, env) as pool:
        return call_in_all([pool], function, *args, **kwargs)[0]


def call_without_jax[**P, R](function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Calls a function that needs no JAX in a new process, which imports none; exceptions reach the caller."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return call_in_all([pool], function, *args, **kwargs)[0]


def emulated_env(num_devices: int) -> dict[str, str]:
    """Returns the environment of a command with emulated CPU devices."""
    return {**os.environ, **emulation_env(num_devices)}


def run_command(command: Sequence[str], env: Mapping[str, str]) -> str:
    """Runs a command and returns its stdout; raises the command's ConfigError, or WorkerError."""
    process = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    require_success(command, process.returncode, process.stderr)
    if not process.stdout.strip():
        raise command_error(command, process.stderr)
    return process.stdout


def run_together(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> list[str]:
    """Runs a command at once in each of these environments; returns their stdouts, raises as `run_command`."""
    with ThreadPoolExecutor(len(environments)) as threads:
        return [*threads.map(partial(run_command, command), environments)]


def require_success(command: Sequence[str], code: int, stderr: str) -> None:
    """Raises the ConfigError that a command has ended with, or WorkerError if it has failed otherwise."""
    if code == ConfigError.exit_code:
        raise ConfigError(stderr.strip().splitlines()[-1].removeprefix("error: "))
    if code:
        raise command_error(command, stderr)


def command_error(command: Sequence[str], stderr: str) -> WorkerError:
    """Returns an error with the last line that the command printed."""
    reason = (stderr.strip().splitlines() or ["no error message"])[-1]
    return WorkerError(f"{' '.join(command)} failed: {reason}; run this command alone to see all its output")


@contextmanager
def started(command: Sequence[str], env: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """Starts a command with pipes, but for its stderr, which a file gets; it does not survive the block."""
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, env=env, stdin=PIPE, stdout=PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def prepared_store(config: str, overrides: Sequence[str]) -> Iterator[Path]:
    """Prepares the data of a config in a temporary folder, as `store`."""
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-", ignore_cleanup_errors=True) as name:
        prepare = ["launch", "data", "prepare", config, *overrides, f"data.store={name}/store"]
        run_command([sys.executable, "-m", *prepare], emulated_env(1))
        yield Path(name)
