"""`python -m launch bench step`: how much slower than hand-written code the framework is.

Every number is a median over turns A B A B in one process; ratios are medians of the ratios of pairs, since what
else the machine does hits both sides of a pair alike.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median

from jaxinfra.bench import last
from jaxinfra.bench.children import Times, asked, last_line
from jaxinfra.bench.start import start
from jaxinfra.bench.table import Cases, Columns, Findings, Row, in_turns, ratio

DISPATCH = (
    "model.layers=2",
    "model.width=64",
    "model.heads=4",
    "model.mlp_dim=128",
    "model.vocab_size=256",
    "data.seq_len=32",
    "train.global_batch=8",
)
"""A model so small that the host's work on a step is all there is to see."""
LAYOUT_PAIRS = 5
"""Turns with naive layouts, which are slow and need no precision."""
START_PAIRS = 5
AGAINST_TURNS = 3

COLUMNS: Columns = {
    "case": ("case", str),
    "jaxinfra": ("jaxinfra", str),
    "bare": ("bare", str),
    "ratio": ("ratio", "{:.3f}".format),
    "goal": ("goal", str),
}
"""Two sides, the ratio of the first to the second, and what it should be."""


def _ms(times_s: Sequence[float], digits: int = 1) -> str:
    return f"{1e3 * median(times_s):.{digits}f} ms"


def _row(
    case: str,
    first_s: Sequence[float],
    second_s: Sequence[float],
    goal: str,
    *,
    notes: tuple[str, str] = ("", ""),
    written: Callable[[Sequence[float]], str] = _ms,
) -> Row:
    first, second = (f"{written(times_s)}{note}" for times_s, note in zip((first_s, second_s), notes, strict=True))
    return {"case": case, "jaxinfra": first, "bare": second, "ratio": ratio(first_s, second_s), "goal": goal}


def measured(options: argparse.Namespace, kind: str, *overrides: str, devices: int = 1, pairs: int = 0) -> Times:
    """Returns times of a kind (see `measure.KINDS`), with these overrides after those of the command line."""
    changes = last((*options.overrides, f"mesh.fsdp={devices}", *overrides))
    pairs = pairs or options.pairs
    return asked("measure", devices, kind=kind, config=options.config, overrides=changes, pairs=pairs)


def step_rows(options: argparse.Namespace, dtype: str, devices: int) -> Iterator[Row]:
    """Times a whole step; in bfloat16 also what the layouts of its products are worth."""
    where = f"step, {dtype}, {'one device' if devices == 1 else f'fsdp={devices}, emulated'}"
    timed = partial(measured, options, devices=devices)
    times_s = timed("step", f"precision.compute={dtype}")
    yield _row(where, times_s["jaxinfra"], times_s["bare"], "<= 1.02")
    if options.against is not None:
        yield from against_rows(options, dtype, devices, where)
    if dtype == "bfloat16":
        times_s = timed("layouts", f"precision.compute={dtype}", pairs=min(options.pairs, LAYOUT_PAIRS))
        case = f"bare {where}: naive products against fast layouts"
        yield _row(case, times_s["naive"], times_s["bare"], "> 1", notes=(" (naive)", ""))


def against_rows(options: argparse.Namespace, dtype: str, devices: int, where: str) -> Iterator[Row]:
    """Times a whole step against that of another script, each side in processes of its own, in turns."""
    script, short = options.against, {"float32": "f32"}.get(dtype, "bf16")
    words = ["--devices", str(devices), "--fsdp", str(devices), "--dtype", short]
    found: list[dict[str, float]] = []
    for _ in range(min(options.pairs, AGAINST_TURNS)):
        times_s = measured(options, "alone", f"precision.compute={dtype}", devices=devices)
        theirs = last_line([sys.executable, str(script), *words], devices)["median_step_ms"] / 1e3
        found.append({name: median(each) for name, each in times_s.items()} | {"theirs": theirs})
    sides = {name: [turn[name] for turn in found] for name in found[0]}
    for name, note, goal in (("jaxinfra", "", "<= 1.02"), ("bare", " (bare)", "about 1 or less")):
        case, notes = f"{where}: {name} against {script.name}", (note, f" ({script.name})")
        yield _row(case, sides[name], sides["theirs"], goal, notes=notes)


def dispatch_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Times the host's work on a small step: of the call alone, and of a turn of the training loop."""
    times_s = measured(options, "dispatch", *DISPATCH)
    ms = partial(_ms, digits=3)
    case = "dispatch: call of the step, devices idle"
    yield _row(case, times_s["jaxinfra"], times_s["bare"], "<= 0.5 ms", written=ms)
    case = "a turn of the training loop, without the wait for devices"
    yield {"case": case, "jaxinfra": ms(times_s["loop"]), "bare": "", "ratio": None, "goal": ""}


def start_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Times process start to the end of the first step."""
    times_s = start(options.config, (*options.overrides, "mesh.fsdp=1"), min(options.pairs, START_PAIRS))
    case = "process start to end of first step, warm compile cache"
    yield _row(case, times_s["jaxinfra"], times_s["bare"], "<= 2.0", written=lambda each: f"{median(each):.2f} s")


CASES: Cases = {
    "float32": partial(step_rows, dtype="float32", devices=1),
    "float32-fsdp8": partial(step_rows, dtype="float32", devices=8),
    "bfloat16": partial(step_rows, dtype="bfloat16", devices=1),
    "bfloat16-fsdp8": partial(step_rows, dtype="bfloat16", devices=8),
    "dispatch": dispatch_rows,
    "start": start_rows,
}


def run(options: argparse.Namespace) -> Findings:
    """Measures the chosen cases, or all."""
    return in_turns(options, CASES, COLUMNS)
