"""`python -m launch bench processes`: what several processes cost, against one process with the same devices.

Two processes with one device each, against one process with two. The steps of both sides alternate, in processes that
stay. Then it trains as a user would, `python -m launch CONFIG`, kills a process with SIGKILL, and starts again; at last
`--supervise` does that.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from jaxinfra.bench import merge_overrides
from jaxinfra.bench.measure import WARMUP_STEPS, TimedStep, jaxinfra_step, load_run
from jaxinfra.bench.process_parity import call_in_all, processes
from jaxinfra.bench.subprocesses import BenchmarkProcessError, Times, command_error, emulated_env, run_command
from jaxinfra.bench.table import BenchmarkResult, Cases, Columns, TableRow, median_ratio, run_cases
from jaxinfra.errors import PeerLostError
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.machine.emulation import emulation_env

NUM_DEVICES = 2
DEVICES = f"cpu:{NUM_DEVICES}"
STEPS_BEFORE_KILL = 3
MAX_ROUNDS = 5  # of parts that start processes

COLUMNS: Columns = {
    "case": ("case", ""),
    "several": ("2 processes x 1 device", ""),
    "one": ("1 process x 2 devices", ""),
    "ratio": ("ratio", "{:.3f}"),
}


def _row(case: str, several_s: Sequence[float], one_s: Sequence[float] | None, unit: str) -> TableRow:
    scale, digits = {"ms": (1e3, 1), "s": (1.0, 2)}[unit]
    cells: dict[str, str | float | None] = {"case": case, "several": f"{scale * median(several_s):.{digits}f} {unit}"}
    if one_s is not None:
        cells |= {"one": f"{scale * median(one_s):.{digits}f} {unit}", "ratio": median_ratio(several_s, one_s)}
    return cells


def step_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times whole steps, in turns: two processes, one, two, one."""
    overrides = tuple(merge_overrides([*options.overrides, f"mesh.fsdp={NUM_DEVICES}", "precision.compute=float32"]))
    environment = emulation_env(NUM_DEVICES)
    shares = [environment | share for share in _shares(environment)]
    with processes(shares) as several, processes([environment]) as one:
        times_s: Times = {"several": [], "one": []}
        for number in range(WARMUP_STEPS + options.pairs):
            for side, pools in (("several", several), ("one", one)):
                elapsed_s = max(call_in_all(pools, _time_one_step, options.config, overrides))
                if number >= WARMUP_STEPS:
                    times_s[side].append(elapsed_s)
    yield _row(f"step, float32, fsdp={NUM_DEVICES}", times_s["several"], times_s["one"], "ms")


def _shares(environment: Mapping[str, str]) -> list[dict[str, str]]:
    """Returns the variables of each of two processes that share the devices of an environment."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        return process_environments(NUM_DEVICES, DEVICES)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _time_one_step(config: str, overrides: tuple[str, ...]) -> float:
    timed = _timed_step(config, overrides)
    with timed.context():
        start_s = time.perf_counter()
        timed.dispatch()
        timed.wait()
        return time.perf_counter() - start_s


@functools.cache
def _timed_step(config: str, overrides: tuple[str, ...]) -> TimedStep:
    return jaxinfra_step(load_run(config, overrides))


class _Training:
    """A run in a directory of its own, started by `python -m launch` in one process or in several."""

    def __init__(self, options: argparse.Namespace, folder: Path, name: str) -> None:
        store, mesh = f"data.store={folder}/store", f"mesh.fsdp={NUM_DEVICES}"
        words = [*options.overrides, mesh, store, f"root={folder}", f"name={name}"]
        self._words = [options.config, *merge_overrides([*words, "track.log_every=1", "checkpoint.save_every=1"])]
        self._folder, self._name = folder, name

    @contextmanager
    def started(self, count: int, *, supervised: bool = False) -> Iterator[list[subprocess.Popen[str]]]:
        """Starts the processes with equal shares of the devices, or a supervisor for them; none survives the block."""
        environment = emulated_env(NUM_DEVICES) | {"JAX_COMPILATION_CACHE_DIR": str(self._folder / f"compiled-{count}")}
        shares = _shares(environment) if count > 1 and not supervised else [{}]
        options = ["--supervise", "--processes", str(count)] if supervised else []
        command, children = [sys.executable, "-u", "-m", "launch", *self._words, *options], []
        with ExitStack() as stack:
            for rank, share in enumerate(shares):
                log = stack.enter_context((self._folder / f"{self._name}-{rank}.log").open("w"))
                child = subprocess.Popen(
                    command, env=environment | share, stdout=subprocess.PIPE, stderr=log, text=True
                )
                stack.callback(_kill, child)
                children.append(child)
            yield children

    def wait_for_step(self, child: subprocess.Popen[str], number: int = 1, *, resumed: bool = False) -> float:
        """Waits until process 0 prints a number of steps, those after its next start if `resumed`; returns the time."""
        assert child.stdout is not None
        for line in child.stdout:
            resumed = resumed and not line.startswith("resuming")
            number -= not resumed and line.startswith("step") and " loss " in line and "validation" not in line
            if number == 0:
                return time.perf_counter()
        raise command_error(self._words, (self._folder / f"{self._name}-0.log").read_text())


def _kill(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    assert child.stdout is not None
    child.stdout.close()


@contextmanager
def _prepared(options: argparse.Namespace) -> Iterator[Path]:
    """Prepares the store of the config in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="jaxinfra-bench-", ignore_cleanup_errors=True) as name:
        prepare = ["launch", "data", "prepare", options.config, *options.overrides, f"data.store={name}/store"]
        run_command([sys.executable, "-m", *prepare], emulated_env(1))
        yield Path(name)


def start_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the start of the processes up to the end of the first step; a first round fills the compile caches."""
    times_s: Times = {"several": [], "one": []}
    with _prepared(options) as folder:
        for number in range(1 + min(options.pairs, MAX_ROUNDS)):
            for side, count in (("several", NUM_DEVICES), ("one", 1)):
                training, start_s = _Training(options, folder, f"{side}-{number}"), time.perf_counter()
                with training.started(count) as children:
                    elapsed_s = training.wait_for_step(children[0]) - start_s
                if number > 0:
                    times_s[side].append(elapsed_s)
    yield _row("process start to end of first step, warm compile cache", times_s["several"], times_s["one"], "s")


def kill_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times how long the other process takes to leave after a SIGKILL, and the restart up to the next step."""
    left_s: dict[int, list[float]] = {index: [] for index in range(NUM_DEVICES)}
    restarts_s: Times = {"several": [], "one": []}
    supervised_s: Times = {"several": [], "one": []}
    with _prepared(options) as folder:
        for number in range(1 + min(options.pairs, MAX_ROUNDS)):
            for index in range(NUM_DEVICES):
                training = _Training(options, folder, f"lost-{index}-{number}")
                elapsed_s = _time_kill(training, index)
                restart_s = _time_restart(training, NUM_DEVICES)
                if number > 0:
                    left_s[index].append(elapsed_s)
                    restarts_s["several"].append(restart_s)
                    restarts_s["one"].append(_time_restart(training, 1))
                else:
                    _time_restart(training, 1)
            for side, count in (("several", NUM_DEVICES), ("one", 1)):
                elapsed_s = _time_supervised(_Training(options, folder, f"supervised-{side}-{number}"), count)
                if number > 0:
                    supervised_s[side].append(elapsed_s)
    for index, times_s in left_s.items():
        other = NUM_DEVICES - 1 - index
        yield _row(f"SIGKILL of process {index} to exit code 76 of process {other}", times_s, None, "s")
    yield _row("restart after a SIGKILL to the next step", restarts_s["several"], restarts_s["one"], "s")
    yield _row("SIGKILL to the next step, with --supervise", supervised_s["several"], supervised_s["one"], "s")


def _time_kill(training: _Training, index: int) -> float:
    with training.started(NUM_DEVICES) as children:
        training.wait_for_step(children[0], STEPS_BEFORE_KILL)
        killed_s = time.perf_counter()
        children[index].kill()
        code = children[1 - index].wait()
        elapsed_s = time.perf_counter() - killed_s
    if code != PeerLostError.exit_code:
        raise BenchmarkProcessError(
            f"process {1 - index} ended with code {code} after a SIGKILL of process {index}, not with "
            f"{PeerLostError.exit_code}; see docs/exit-codes.md"
        )
    return elapsed_s


def _time_restart(training: _Training, count: int) -> float:
    start_s = time.perf_counter()
    with training.started(count) as children:
        elapsed_s = training.wait_for_step(children[0]) - start_s
        for child in children:
            child.send_signal(signal.SIGKILL)
    return elapsed_s


def _time_supervised(training: _Training, count: int) -> float:
    """Kills the last process of a supervised run."""
    with training.started(count, supervised=True) as (supervisor,):
        training.wait_for_step(supervisor, STEPS_BEFORE_KILL)
        ranks = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        killed_s = time.perf_counter()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        return training.wait_for_step(supervisor, resumed=True) - killed_s


CASES: Cases = {"step": step_rows, "start": start_rows, "kill": kill_rows}


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the cases that `--only` names, or all."""
    return run_cases(options, CASES, COLUMNS)
