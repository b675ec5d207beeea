"""`python -m launch bench step`: compares the training step with the hand-written baseline.

Both sides run alternately in one process, but for the start, of which each is a process of its own. On one device
PyTorch takes its turns in the same rounds, eager and compiled, in processes of its own. Times are medians, ratios are
medians of the ratios of the rounds; in parentheses is that of jaxinfra to PyTorch.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import jax

from jaxinfra.config import load
from jaxinfra.errors import ConfigError
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.processes.peers import current_peers
from jaxinfra.run import Run
from tests.bench import merge_overrides
from tests.bench.commands import (
    Times,
    call_in_process,
    command_error,
    emulated_env,
    prepared_store,
    run_command,
    started,
)
from tests.bench.measure import Makers, baseline_config, baseline_step, jaxinfra_step, time_dispatch, time_sides
from tests.bench.table import BenchmarkResult, Cases, Columns, TableRow, median_ratio, ratio_row, run_cases, time_rounds
from tests.bench.torch_side import torch_step
from tests.interop.torch_python import TORCH_PYTHON

# So small that the host's work dominates the step.
DISPATCH_MODEL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.layers.mixer.num_heads=4",
    "model.layers.mlp.dim=128",
    "model.vocab_size=256",
    "data.seq_len=32",
    "train.global_batch=8",
)
# A model of characters: the smallest that people train.
CHARACTERS = (
    "model.num_layers=4",
    "model.hidden_size=128",
    "model.layers.mixer.num_heads=4",
    "model.layers.mlp.dim=512",
    "model.vocab_size=65",
    "data.seq_len=64",
    "train.global_batch=12",
)
TORCH: Makers = {"eager": partial(torch_step, mode="eager"), "compile": partial(torch_step, mode="compile")}
BOTH: Makers = {"jaxinfra": jaxinfra_step, "baseline": baseline_step}
NAIVE: Makers = {"naive": partial(baseline_step, naive_matmul=True), "baseline": baseline_step}
MAX_LAYOUT_ROUNDS = 5  # naive matmuls are slow, and their ratio is far from 1
MAX_STARTUP_ROUNDS = 5
MAX_AGAINST_ROUNDS = 3

COLUMNS: Columns = {
    "case": ("case", ""),
    "jaxinfra": ("jaxinfra", ""),
    "baseline": ("baseline", ""),
    "ratio": ("ratio", "{:.3f}"),
    "goal": ("goal", ""),
    "eager": ("torch eager", ""),
    "compile": ("torch.compile", ""),
}


def _measure(
    options: argparse.Namespace, makers: Makers, dtype: str, num_devices: int, max_rounds: int | None = None
) -> Times:
    """Times whole steps in a new process."""
    overrides = merge_overrides([*options.overrides, f"mesh.fsdp={num_devices}", f"precision.compute={dtype}"])
    num_rounds = min(options.pairs, max_rounds or options.pairs)
    return call_in_process(time_sides, emulation_env(num_devices), makers, options.config, overrides, num_rounds)


def torch_cells(times_s: Times) -> TableRow:
    """Returns the milliseconds of PyTorch and the ratio of jaxinfra to it, if it was measured."""
    cells: dict[str, str | float | None] = {}
    for side in TORCH.keys() & times_s.keys():
        ratio = median_ratio(times_s["jaxinfra"], times_s[side])
        cells |= {side: f"{1e3 * median(times_s[side]):.1f} ms ({ratio:.2f})", f"ratio to {side}": ratio}
    return cells


def character_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times whole steps of a tiny model, whose operations are so small that what is between them counts."""
    small = argparse.Namespace(**vars(options) | {"overrides": [*CHARACTERS, *options.overrides]})
    times_s = _measure(small, {**BOTH, **_torch()}, "float32", 1)
    sides = {side: times_s[side] for side in BOTH}
    row = ratio_row("step of characters, float32, one device", sides)
    yield {**row, "goal": "<= 1.02", **torch_cells(times_s)}


def _torch() -> Makers:
    """Returns the sides of PyTorch; none, and says so, where it is not installed."""
    if not TORCH_PYTHON.exists():
        print("without PyTorch, which `make test-slow` installs", file=sys.stderr, flush=True)
        return {}
    return TORCH


def step_rows(options: argparse.Namespace, dtype: str, num_devices: int) -> Iterator[TableRow]:
    """Times whole steps; in bfloat16 also the baseline with naive matmuls, which shows the gain of fast layouts."""
    case = f"step, {dtype}, {'one device' if num_devices == 1 else f'fsdp={num_devices}, emulated'}"
    makers = {**BOTH, **_torch()} if num_devices == 1 else BOTH
    times_s = _measure(options, makers, dtype, num_devices)
    row = ratio_row(case, {side: times_s[side] for side in BOTH})
    yield {**row, "goal": "<= 1.02", **torch_cells(times_s)}
    if options.against is not None:
        yield from against_rows(options, dtype, num_devices, case)
    if dtype == "bfloat16":
        times_s = _measure(options, NAIVE, dtype, num_devices, MAX_LAYOUT_ROUNDS)
        sides = {"jaxinfra": times_s["naive"], "baseline": times_s["baseline"]}
        row = ratio_row(f"baseline {case}: naive matmuls against fast layouts", sides)
        yield row | {"jaxinfra": f"{row['jaxinfra']} (naive)", "goal": "> 1"}


def against_rows(options: argparse.Namespace, dtype: str, num_devices: int, case: str) -> Iterator[TableRow]:
    """Times whole steps against the script of `--against`, each side in processes of its own."""
    script, short_dtype = options.against, "f32" if dtype == "float32" else "bf16"
    arguments = ["--devices", str(num_devices), "--fsdp", str(num_devices), "--dtype", short_dtype]
    medians_s: Times = {"jaxinfra": [], "baseline": [], "script": []}
    for _ in range(min(options.pairs, MAX_AGAINST_ROUNDS)):
        for side, make in BOTH.items():
            times_s = _measure(options, {side: make}, dtype, num_devices)
            medians_s[side].append(median(times_s[side]))
        output = run_command([sys.executable, str(script), *arguments], emulated_env(num_devices))
        medians_s["script"].append(json.loads(output.splitlines()[-1])["median_step_ms"] / 1e3)
    for side, note, goal in (("jaxinfra", "", "<= 1.02"), ("baseline", " (baseline)", "about 1 or less")):
        sides = {"jaxinfra": medians_s[side], "baseline": medians_s["script"]}
        row = ratio_row(f"{case}: {side} against {script.name}", sides)
        cells = {"jaxinfra": f"{row['jaxinfra']}{note}", "baseline": f"{row['baseline']} ({script.name})", "goal": goal}
        yield row | cells


def dispatch_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the host's work on a small step: the dispatch alone, and one iteration of the training loop."""
    overrides = merge_overrides([*options.overrides, "mesh.fsdp=1", *DISPATCH_MODEL])
    times_s = call_in_process(time_dispatch, emulation_env(1), options.config, overrides, options.pairs)
    loop = {"jaxinfra": times_s.pop("loop")}
    yield ratio_row("dispatch of a step, devices idle", times_s, digits=3) | {"goal": "<= 0.5 ms"}
    yield ratio_row("iteration of the training loop, without waiting for devices", loop, digits=3)


def first_step_s(command: Sequence[str], env: Mapping[str, str], log: Path) -> float:
    """Starts a command, kills it when it prints the loss of its first step, and returns the seconds until then."""
    start_s = time.perf_counter()
    with started(command, env, log) as process:
        for line in process.stdout or ():
            if line.startswith("step ") and " loss " in line:
                return time.perf_counter() - start_s
    raise command_error(command, log.read_text())


def startup_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the start of a process up to the end of its first step; a first round fills the compilation caches.

    jaxinfra starts as a user would start it, `python -m launch CONFIG`: config, data store, checkpoints, trackers. The
    baseline is a script.
    """
    overrides = [*options.overrides, "mesh.fsdp=1"]
    baseline = json.dumps(asdict(baseline_config(load(options.config, overrides, root=Run).run)))
    with prepared_store(options.config, overrides) as folder:

        def start(side: str, number: int) -> float:
            # A new run directory each time, else the second start would resume the first run.
            places = [f"root={folder / str(number)}", f"data.store={folder}/store"]
            train = ["launch", options.config, *overrides, *places, "track.log_every=1"]
            module = train if side == "jaxinfra" else ["tests.bench.baseline", baseline]
            env = emulated_env(1) | {"JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled-{side}")}
            return first_step_s([sys.executable, "-m", *module], env, folder / "log")

        times_s = time_rounds({side: partial(start, side) for side in BOTH}, min(options.pairs, MAX_STARTUP_ROUNDS))
    case = "process start to end of first step, warm compilation cache"
    yield ratio_row(case, times_s, unit="s", digits=2) | {"goal": "<= 2.0"}


CASES: Cases = {
    "float32": partial(step_rows, dtype="float32", num_devices=1),
    "characters": character_rows,
    "float32-fsdp8": partial(step_rows, dtype="float32", num_devices=8),
    "bfloat16": partial(step_rows, dtype="bfloat16", num_devices=1),
    "bfloat16-fsdp8": partial(step_rows, dtype="bfloat16", num_devices=8),
    "dispatch": dispatch_rows,
    "start": startup_rows,
}


def joined_rows(options: argparse.Namespace, dtype: str) -> Iterator[TableRow]:
    """Times whole steps on the devices of all processes, which all call this."""
    processes, num_devices = jax.process_count(), jax.device_count()
    overrides = merge_overrides([*options.overrides, f"mesh.fsdp={num_devices}", f"precision.compute={dtype}"])
    times_s = time_sides(BOTH, options.config, overrides, options.pairs)
    yield ratio_row(f"step, {dtype}, fsdp={num_devices}, {processes} processes", times_s) | {"goal": "<= 1.02"}


JOINED_CASES: Cases = {dtype: partial(joined_rows, dtype=dtype) for dtype in ("float32", "bfloat16")}


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the cases that `--only` names, or all; in several processes only whole steps, on all their devices."""
    if current_peers().count == 1:
        return run_cases(options, CASES, COLUMNS)
    for part in options.only or ():
        if part not in JOINED_CASES:
            joined = ", ".join(JOINED_CASES)
            raise ConfigError(f"--only {part}: several processes do not measure it; use one process, or {joined}")
    if options.against is not None:
        raise ConfigError(f"--against {options.against}: several processes do not time scripts; use one process")
    return run_cases(options, JOINED_CASES, COLUMNS)
