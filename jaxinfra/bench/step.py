"""`python -m launch bench step`: compares the training step with the hand-written baseline.

Both sides run alternately in one process. Times are medians, ratios are medians of the ratios of the rounds.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median

import jax

from jaxinfra.bench import merge_overrides
from jaxinfra.bench.measure import Makers, baseline_step, jaxinfra_step, time_dispatch, time_sides
from jaxinfra.bench.startup import time_startup
from jaxinfra.bench.subprocesses import Times, call_in_process, emulated_env, run_command
from jaxinfra.bench.table import BenchmarkResult, Cases, Columns, TableRow, format_median, median_ratio, run_cases
from jaxinfra.errors import ConfigError
from jaxinfra.machine.emulation import emulation_env
from jaxinfra.processes.peers import current_peers

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
}


def comparison_row(
    case: str,
    first_s: Sequence[float],
    second_s: Sequence[float],
    goal: str,
    *,
    unit: str = "ms",
    digits: int = 1,
    notes: tuple[str, str] = ("", ""),
) -> TableRow:
    """Compares two sides; `notes` name them where they are not jaxinfra and the baseline, as in "12.3 ms (naive)"."""
    return {
        "case": case,
        "jaxinfra": format_median(first_s, unit, digits) + notes[0],
        "baseline": format_median(second_s, unit, digits) + notes[1],
        "ratio": median_ratio(first_s, second_s),
        "goal": goal,
    }


def _measure(
    options: argparse.Namespace, makers: Makers, dtype: str, num_devices: int, max_rounds: int | None = None
) -> Times:
    """Times whole steps in a new process."""
    overrides = merge_overrides([*options.overrides, f"mesh.fsdp={num_devices}", f"precision.compute={dtype}"])
    num_rounds = min(options.pairs, max_rounds or options.pairs)
    return call_in_process(time_sides, emulation_env(num_devices), makers, options.config, overrides, num_rounds)


def step_rows(options: argparse.Namespace, dtype: str, num_devices: int) -> Iterator[TableRow]:
    """Times whole steps; in bfloat16 also the baseline with naive matmuls, which shows the gain of fast layouts."""
    case = f"step, {dtype}, {'one device' if num_devices == 1 else f'fsdp={num_devices}, emulated'}"
    times_s = _measure(options, BOTH, dtype, num_devices)
    yield comparison_row(case, times_s["jaxinfra"], times_s["baseline"], "<= 1.02")
    if options.against is not None:
        yield from against_rows(options, dtype, num_devices, case)
    if dtype == "bfloat16":
        times_s = _measure(options, NAIVE, dtype, num_devices, MAX_LAYOUT_ROUNDS)
        case = f"baseline {case}: naive matmuls against fast layouts"
        yield comparison_row(case, times_s["naive"], times_s["baseline"], "> 1", notes=(" (naive)", ""))


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
        title, notes = f"{case}: {side} against {script.name}", (note, f" ({script.name})")
        yield comparison_row(title, medians_s[side], medians_s["script"], goal, notes=notes)


def dispatch_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the host's work on a small step: the dispatch alone, and one iteration of the training loop."""
    overrides = merge_overrides([*options.overrides, "mesh.fsdp=1", *DISPATCH_MODEL])
    times_s = call_in_process(time_dispatch, emulation_env(1), options.config, overrides, options.pairs)
    case = "dispatch of a step, devices idle"
    yield comparison_row(case, times_s["jaxinfra"], times_s["baseline"], "<= 0.5 ms", digits=3)
    case = "iteration of the training loop, without waiting for devices"
    yield {"case": case, "jaxinfra": format_median(times_s["loop"], "ms", 3)}


def startup_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the start of a process up to the end of its first step."""
    num_rounds = min(options.pairs, MAX_STARTUP_ROUNDS)
    times_s = time_startup(options.config, (*options.overrides, "mesh.fsdp=1"), num_rounds)
    case = "process start to end of first step, warm compilation cache"
    yield comparison_row(case, times_s["jaxinfra"], times_s["baseline"], "<= 2.0", unit="s", digits=2)


CASES: Cases = {
    "float32": partial(step_rows, dtype="float32", num_devices=1),
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
    case = f"step, {dtype}, fsdp={num_devices}, {processes} processes"
    yield comparison_row(case, times_s["jaxinfra"], times_s["baseline"], "<= 1.02")


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
