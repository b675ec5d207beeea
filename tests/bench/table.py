"""Times the sides of a benchmark in turn, and formats its result: a table, a line about the machine, and JSON."""

import argparse
import importlib.metadata
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from jaxinfra.machine.environment import cpu_model

type TableRow = Mapping[str, str | float | None]
"""The cells of one row by key, as JSON values."""
type Columns = Mapping[str, tuple[str, str]]
"""The title of each column, and the format of its numbers, such as "{:.1f} ms", by key."""
type Cases = Mapping[str, Callable[[argparse.Namespace], Iterable[TableRow]]]
"""The parts of a benchmark, by the names that `--only` takes."""


def describe_machine() -> dict[str, str]:
    """Returns the CPU, its cores, the versions of Python and JAX, and the date."""
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "date": time.strftime("%Y-%m-%d"),
    }


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """The result of a benchmark."""

    text: str  # the table
    note: str  # how it was measured
    measurements: Mapping[str, object]  # the numbers of the table as JSON values
    environment: Mapping[str, str] = field(default_factory=describe_machine)

    def __str__(self) -> str:
        return f"{self.text}\n\n{self.note}; {', '.join(f'{key} {value}' for key, value in self.environment.items())}."


def format_table(columns: Columns, rows: Iterable[TableRow]) -> str:
    """Formats a Markdown table with aligned columns; missing cells are blank."""
    cells = [[title for title, _ in columns.values()]]
    for row in rows:
        cells.append([_format_cell(row.get(key), number_format) for key, (_, number_format) in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _format_cell(value: str | float | None, number_format: str) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return number_format.format(value)


def median_ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the median of the ratios of the rounds: other load on the machine slows both sides of a round alike."""
    return median(a / b for a, b in zip(first, second, strict=True))


def ratio_row(
    case: str, times_s: Mapping[str, Sequence[float]], *, unit: Literal["s", "ms"] = "ms", digits: int = 1
) -> dict[str, str | float | None]:
    """Returns the median of each side's seconds, in the column of the side; of two sides also their `median_ratio`."""
    scale = {"s": 1, "ms": 1e3}[unit]
    row: dict[str, str | float | None] = {"case": case}
    row |= {side: f"{scale * median(each_s):.{digits}f} {unit}" for side, each_s in times_s.items()}
    if len(times_s) == 2:
        row["ratio"] = median_ratio(*times_s.values())
    return row


def time_rounds[K, V](
    sides: Mapping[K, Callable[[int], V]],
    num_rounds: int,
    *,
    warmup: int = 1,
    shuffled: bool = False,
    shows: bool = False,
) -> dict[K, list[V]]:
    """Calls the sides in turn, with the number of the round; returns what each has returned after the warm-up.

    `shuffled` takes another order in each round, `shows` prints a line to standard error after each.
    """
    found: dict[K, list[V]] = {side: [] for side in sides}
    for number in range(warmup + num_rounds):
        for side in random.Random(number).sample([*sides], len(sides)) if shuffled else sides:
            value = sides[side](number)
            if number >= warmup:
                found[side].append(value)
        if shows:
            print(f"round {max(0, number + 1 - warmup)} of {num_rounds}", file=sys.stderr, flush=True)
    return found


def run_cases(options: argparse.Namespace, cases: Cases, columns: Columns, note: str = "") -> BenchmarkResult:
    """Measures the cases that `--only` names, or all; `note` follows "Medians of 15 rounds"."""
    rows: list[TableRow] = []
    for name in options.only or cases:
        if options.prints:
            print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += cases[name](options)
    return BenchmarkResult(
        text=format_table(columns, rows),
        note=f"Medians of {options.pairs} rounds{note}",
        measurements={"rows": rows, "pairs": options.pairs},
    )
