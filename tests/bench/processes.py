"""`python -m launch bench processes`: what several processes cost, against one process with the same devices.

Two processes with one device each, against one process with two. The steps of both sides alternate, in processes that
stay. Then it trains as a user would, `python -m launch CONFIG`, kills a process with SIGKILL, and starts again; at last
`--supervise` does that.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path

from jaxinfra.errors import PeerLostError
from jaxinfra.launchers.local_processes import process_environments
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.parity.processes import processes
from tests.bench import merge_overrides
from tests.bench.commands import (
    WorkerError,
    call_in_all,
    command_error,
    emulated_env,
    prepared_store,
    started,
)
from tests.bench.measure import WARMUP_STEPS, TimedStep, jaxinfra_step, load_run
from tests.bench.table import Cases, Columns, TableRow, ratio_row, time_rounds

NUM_DEVICES = 2
DEVICES = f"cpu:{NUM_DEVICES}"
COUNTS = {"several": NUM_DEVICES, "one": 1}  # processes of each side
STEPS_BEFORE_KILL = 3
MAX_ROUNDS = 5  # of parts that start processes

COLUMNS: Columns = {
    "case": ("case", ""),
    "several": ("2 processes x 1 device", ""),
    "one": ("1 process x 2 devices", ""),
    "ratio": ("ratio", "{:.3f}"),
}


_seconds_row = partial(ratio_row, unit="s", digits=2)


def step_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times whole steps, in turns: two processes, one, two, one."""
    overrides = tuple(merge_overrides([*options.overrides, f"mesh.fsdp={NUM_DEVICES}", "precision.compute=float32"]))
    environment = emulation_env(NUM_DEVICES)
    shares = [environment | share for share in _shares(environment)]

    def time_step(pools: Sequence[ProcessPoolExecutor], number: int) -> float:
        return max(call_in_all(pools, _time_one_step, options.config, overrides))

    with processes(shares) as several, processes([environment]) as one:
        sides = {"several": partial(time_step, several), "one": partial(time_step, one)}
        times_s = time_rounds(sides, options.pairs, warmup=WARMUP_STEPS)
    yield ratio_row(f"step, float32, fsdp={NUM_DEVICES}", times_s)


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
    return _timed_step(config, overrides).time()


@cache
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
                log = self._folder / f"{self._name}-{rank}.log"
                children.append(stack.enter_context(started(command, environment | share, log)))
            yield children

    def wait_for_step(self, child: subprocess.Popen[str], number: int = 1, *, resumed: bool = False) -> float:
        """Waits until process 0 prints a number of steps, those after its next start if `resumed`; returns the time."""
        assert child.stdout is not None
        is_started = not resumed
        for line in child.stdout:
            is_started = is_started or line.startswith("resuming")
            is_step = line.startswith("step") and " loss " in line and "validation" not in line
            if is_started and is_step:
                number -= 1
                if number == 0:
                    return time.perf_counter()
        raise command_error(self._words, (self._folder / f"{self._name}-0.log").read_text())


def start_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the start of the processes up to the end of the first step; a first round fills the compile caches."""
    with prepared_store(options.config, options.overrides) as folder:

        def start(side: str, number: int) -> float:
            return _time_start(_Training(options, folder, f"{side}-{number}"), COUNTS[side])

        times_s = time_rounds({side: partial(start, side) for side in COUNTS}, min(options.pairs, MAX_ROUNDS))
    yield _seconds_row("process start to end of first step, warm compile cache", times_s)


def kill_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times how long the other process takes to leave after a SIGKILL, and the restart up to the next step."""
    num_rounds = min(options.pairs, MAX_ROUNDS)
    with prepared_store(options.config, options.overrides) as folder:

        def lose(index: int, number: int) -> tuple[float, float, float]:
            training = _Training(options, folder, f"lost-{index}-{number}")
            return _time_kill(training, index), _time_start(training, NUM_DEVICES), _time_start(training, 1)

        def supervise(side: str, number: int) -> float:
            return _time_supervised(_Training(options, folder, f"supervised-{side}-{number}"), COUNTS[side])

        lost = time_rounds({index: partial(lose, index) for index in range(NUM_DEVICES)}, num_rounds)
        supervised_s = time_rounds({side: partial(supervise, side) for side in COUNTS}, num_rounds)
    for index, times_s in lost.items():
        other, left_s = NUM_DEVICES - 1 - index, [left_s for left_s, *_ in times_s]
        yield _seconds_row(f"SIGKILL of process {index} to exit code 76 of process {other}", {"several": left_s})
    restarts_s = [restart_s for times_s in lost.values() for _, *restart_s in times_s]
    several_s, one_s = zip(*restarts_s, strict=True)
    yield _seconds_row("restart after a SIGKILL to the next step", {"several": several_s, "one": one_s})
    yield _seconds_row("SIGKILL to the next step, with --supervise", supervised_s)


def _time_kill(training: _Training, index: int) -> float:
    with training.started(NUM_DEVICES) as children:
        training.wait_for_step(children[0], STEPS_BEFORE_KILL)
        killed_s = time.perf_counter()
        children[index].kill()
        code = children[1 - index].wait()
        elapsed_s = time.perf_counter() - killed_s
    if code != PeerLostError.exit_code:
        raise WorkerError(
            f"process {1 - index} ended with code {code} after a SIGKILL of process {index}, not with "
            f"{PeerLostError.exit_code}; see docs/exit-codes.md"
        )
    return elapsed_s


def _time_start(training: _Training, count: int) -> float:
    start_s = time.perf_counter()
    with training.started(count) as children:
        return training.wait_for_step(children[0]) - start_s


def _time_supervised(training: _Training, count: int) -> float:
    """Kills the last process of a supervised run."""
    with training.started(count, supervised=True) as (supervisor,):
        training.wait_for_step(supervisor, STEPS_BEFORE_KILL)
        ranks = Path(f"/proc/{supervisor.pid}/task/{supervisor.pid}/children").read_text().split()
        killed_s = time.perf_counter()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        return training.wait_for_step(supervisor, resumed=True) - killed_s


CASES: Cases = {"step": step_rows, "start": start_rows, "kill": kill_rows}
