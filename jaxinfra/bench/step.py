"""`python -m launch bench step`: compares the training step with the hand-written baseline.

Both sides run alternately in one process. Times are medians, ratios are medians of the ratios of the rounds.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Literal

from jaxinfra.bench import merge_overrides
from jaxinfra.bench.startup import time_startup
from jaxinfra.bench.subprocesses import Times, last_line, run_module
from jaxinfra.bench.table import BenchmarkResult, Cases, Columns, TableRow, median_ratio, run_cases

# So small that the host's work dominates the step.
DISPATCH_MODEL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.mlp_dim=128",
    "model.vocab_size=256",
    "data.seq_len=32",
    "train.global_batch=8",
)
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


def _format_median(times_s: Sequence[float], unit: Literal["s", "ms"] = "ms", digits: int = 1) -> str:
    return f"{median(times_s) * {'s': 1, 'ms': 1e3}[unit]:.{digits}f} {unit}"


def _row(
    case: str,
    first_s: Sequence[float],
    second_s: Sequence[float],
    goal: str,
    *,
    notes: tuple[str, str] = ("", ""),
    format_times: Callable[[Sequence[float]], str] = _format_median,
) -> TableRow:
    return {
        "case": case,
        "jaxinfra": format_times(first_s) + notes[0],
        "baseline": format_times(second_s) + notes[1],
        "ratio": median_ratio(first_s, second_s),
        "goal": goal,
    }


def measure_in_subprocess(
    options: argparse.Namespace, kind: str, *overrides: str, num_devices: int = 1, max_rounds: int | None = None
) -> Times:
    """Runs `measure.measure` in a new process; `overrides` follow the overrides of the command line."""
    request = {
        "kind": kind,
        "config": options.config,
        "overrides": merge_overrides([*options.overrides, f"mesh.fsdp={num_devices}", *overrides]),
        "num_rounds": options.pairs if max_rounds is None else min(options.pairs, max_rounds),
    }
    return json.loads(run_module("measure", num_devices, **request))


def step_rows(options: argparse.Namespace, dtype: str, num_devices: int) -> Iterator[TableRow]:
    """Times whole steps; in bfloat16 also the baseline with naive matmuls, which shows the gain of fast layouts."""
    case = f"step, {dtype}, {'one device' if num_devices == 1 else f'fsdp={num_devices}, emulated'}"
    precision = f"precision.compute={dtype}"
    times_s = measure_in_subprocess(options, "step", precision, num_devices=num_devices)
    yield _row(case, times_s["jaxinfra"], times_s["baseline"], "<= 1.02")
    if options.against is not None:
        yield from against_rows(options, dtype, num_devices, case)
    if dtype == "bfloat16":
        times_s = measure_in_subprocess(
            options, "layouts", precision, num_devices=num_devices, max_rounds=MAX_LAYOUT_ROUNDS
        )
        case = f"baseline {case}: naive matmuls against fast layouts"
        yield _row(case, times_s["naive"], times_s["baseline"], "> 1", notes=(" (naive)", ""))


def against_rows(options: argparse.Namespace, dtype: str, num_devices: int, case: str) -> Iterator[TableRow]:
    """Times whole steps against the script of `--against`, each side in processes of its own."""
    script, short_dtype = options.against, {"float32": "f32"}.get(dtype, "bf16")
    words = ["--devices", str(num_devices), "--fsdp", str(num_devices), "--dtype", short_dtype]
    rounds: list[dict[str, float]] = []
    for _ in range(min(options.pairs, MAX_AGAINST_ROUNDS)):
        times_s = measure_in_subprocess(options, "alone", f"precision.compute={dtype}", num_devices=num_devices)
        answer = json.loads(last_line([sys.executable, str(script), *words], num_devices))
        rounds.append({side: median(each) for side, each in times_s.items()})
        rounds[-1]["script"] = answer["median_step_ms"] / 1e3
    sides = {side: [each[side] for each in rounds] for side in rounds[0]}
    for side, note, goal in (("jaxinfra", "", "<= 1.02"), ("baseline", " (baseline)", "about 1 or less")):
        title, notes = f"{case}: {side} against {script.name}", (note, f" ({script.name})")
        yield _row(title, sides[side], sides["script"], goal, notes=notes)


def dispatch_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the host's work on a small step: the dispatch alone, and one iteration of the training loop."""
    times_s = measure_in_subprocess(options, "dispatch", *DISPATCH_MODEL)
    ms = partial(_format_median, digits=3)
    case = "dispatch of a step, devices idle"
    yield _row(case, times_s["jaxinfra"], times_s["baseline"], "<= 0.5 ms", format_times=ms)
    yield {"case": "iteration of the training loop, without waiting for devices", "jaxinfra": ms(times_s["loop"])}


def startup_rows(options: argparse.Namespace) -> Iterator[TableRow]:
    """Times the start of a process up to the end of its first step."""
    num_rounds = min(options.pairs, MAX_STARTUP_ROUNDS)
    times_s = time_startup(options.config, (*options.overrides, "mesh.fsdp=1"), num_rounds)
    case = "process start to end of first step, warm compilation cache"
    seconds = partial(_format_median, unit="s", digits=2)
    yield _row(case, times_s["jaxinfra"], times_s["baseline"], "<= 2.0", format_times=seconds)


CASES: Cases = {
    "float32": partial(step_rows, dtype="float32", num_devices=1),
    "float32-fsdp8": partial(step_rows, dtype="float32", num_devices=8),
    "bfloat16": partial(step_rows, dtype="bfloat16", num_devices=1),
    "bfloat16-fsdp8": partial(step_rows, dtype="bfloat16", num_devices=8),
    "dispatch": dispatch_rows,
    "start": startup_rows,
}


def run(options: argparse.Namespace) -> BenchmarkResult:
    """Measures the cases that `--only` names, or all."""
    return run_cases(options, CASES, COLUMNS)
