"""`python -m launch bench step`: how much slower than hand-written code the framework is.

Every number is a median over turns A B A B in one process; ratios are medians of the ratios of pairs, since what
else the machine does hits both sides of a pair alike.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median

from jaxinfra.bench.children import Request, Times, last_line, measured
from jaxinfra.bench.start import start
from jaxinfra.bench.table import Findings, machine, table

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: two sides, the ratio of the first to the second, and what it should be."""

    case: str
    jaxinfra: str
    bare: str
    ratio: float | None
    goal: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What is asked for on the command line."""

    config: str
    overrides: tuple[str, ...]
    pairs: int
    against: Path | None

    def measured(self, kind: str, *overrides: str, devices: int = 1, pairs: int | None = None) -> Times:
        """Times of a kind (see `measure.KINDS`), with these overrides before those of the command line."""
        last = {change.partition("=")[0]: change for change in (*self.overrides, f"mesh.fsdp={devices}", *overrides)}
        request = Request(kind=kind, config=self.config, overrides=list(last.values()), pairs=pairs or self.pairs)
        return measured(request, devices)


def _ms(times_s: Sequence[float], digits: int = 1) -> str:
    return f"{1e3 * median(times_s):.{digits}f} ms"


def _ratio(a: Sequence[float], b: Sequence[float]) -> float:
    return median(x / y for x, y in zip(a, b, strict=True))


def _where(devices: int) -> str:
    return "one device" if devices == 1 else f"fsdp={devices}, emulated"


def step_rows(scope: Scope, dtype: str, devices: int) -> Iterator[Row]:
    """A whole step; in bfloat16 also what the layouts of its products are worth."""
    compute = f"precision.compute={dtype}"
    times_s = scope.measured("step", compute, devices=devices)
    ours, bare = times_s["jaxinfra"], times_s["bare"]
    case = f"step, {dtype}, {_where(devices)}"
    yield Row(case=case, jaxinfra=_ms(ours), bare=_ms(bare), ratio=_ratio(ours, bare), goal="<= 1.02")
    if scope.against is not None:
        yield from against_rows(scope, scope.against, dtype, devices)
    if dtype == "bfloat16":
        times_s = scope.measured("layouts", compute, devices=devices, pairs=min(scope.pairs, LAYOUT_PAIRS))
        naive, bare = times_s["naive"], times_s["bare"]
        yield Row(
            case=f"bare step, {dtype}, {_where(devices)}: naive products against fast layouts",
            jaxinfra=f"{_ms(naive)} (naive)",
            bare=_ms(bare),
            ratio=_ratio(naive, bare),
            goal="> 1",
        )


def against_rows(scope: Scope, script: Path, dtype: str, devices: int) -> Iterator[Row]:
    """A whole step against that of another script, each side in processes of its own, in turns."""
    words = ["--devices", str(devices), "--fsdp", str(devices), "--dtype", {"float32": "f32"}.get(dtype, "bf16")]
    ours_s, bare_s, theirs_s = [], [], []
    for _ in range(min(scope.pairs, AGAINST_TURNS)):
        times_s = scope.measured("alone", f"precision.compute={dtype}", devices=devices)
        ours_s.append(median(times_s["jaxinfra"]))
        bare_s.append(median(times_s["bare"]))
        said = last_line([sys.executable, str(script), *words], devices)
        theirs_s.append(said["median_step_ms"] / 1e3)
    for name, times_s in (("jaxinfra", ours_s), ("bare", bare_s)):
        yield Row(
            case=f"step, {dtype}, {_where(devices)}: {name} against {script.name}",
            jaxinfra=_ms(times_s) if name == "jaxinfra" else f"{_ms(times_s)} (bare)",
            bare=f"{_ms(theirs_s)} ({script.name})",
            ratio=_ratio(times_s, theirs_s),
            goal="<= 1.02" if name == "jaxinfra" else "about 1 or less",
        )


def dispatch_rows(scope: Scope) -> Iterator[Row]:
    """Host time of a small step: of the call alone, and of a turn of the training loop."""
    times_s = scope.measured("dispatch", *DISPATCH)
    ours, bare, loop = (times_s[name] for name in ("jaxinfra", "bare", "loop"))
    yield Row(
        case="dispatch: call of the step, devices idle",
        jaxinfra=_ms(ours, 3),
        bare=_ms(bare, 3),
        ratio=_ratio(ours, bare),
        goal="<= 0.5 ms",
    )
    yield Row(
        case="a turn of the training loop, without the wait for devices",
        jaxinfra=_ms(loop, 3),
        bare="",
        ratio=None,
        goal="",
    )


def start_rows(scope: Scope) -> Iterator[Row]:
    """Process start to the end of the first step."""
    times_s = start(scope.config, (*scope.overrides, "mesh.fsdp=1"), min(scope.pairs, START_PAIRS))
    ours, bare = times_s["jaxinfra"], times_s["bare"]
    yield Row(
        case="process start to end of first step, warm compile cache",
        jaxinfra=f"{median(ours):.2f} s",
        bare=f"{median(bare):.2f} s",
        ratio=_ratio(ours, bare),
        goal="<= 2.0",
    )


CASES: dict[str, Callable[[Scope], Iterator[Row]]] = {
    "float32": lambda scope: step_rows(scope, "float32", 1),
    "float32-fsdp8": lambda scope: step_rows(scope, "float32", 8),
    "bfloat16": lambda scope: step_rows(scope, "bfloat16", 1),
    "bfloat16-fsdp8": lambda scope: step_rows(scope, "bfloat16", 8),
    "dispatch": dispatch_rows,
    "start": start_rows,
}


def cells_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The head of the table, and a line for each row."""
    head = ("case", "jaxinfra", "bare", "ratio", "goal")
    return [head, *((r.case, r.jaxinfra, r.bare, "" if r.ratio is None else f"{r.ratio:.3f}", r.goal) for r in rows)]


def run(options: argparse.Namespace) -> Findings:
    """Measures the chosen cases, or all."""
    scope = Scope(
        config=options.config, overrides=tuple(options.overrides), pairs=options.pairs, against=options.against
    )
    rows: list[Row] = []
    for name in options.only or CASES:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += CASES[name](scope)
    return Findings(
        text=table(cells_of(rows)),
        note=f"Medians of {scope.pairs} pairs in turns",
        figures={"rows": [dataclasses.asdict(row) for row in rows], "pairs": scope.pairs},
        facts=machine(),
    )
