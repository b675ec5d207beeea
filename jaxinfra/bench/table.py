"""Formats the result of a benchmark: a table, a line about the machine, and the figures as JSON."""

import argparse
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

type Row = dict[str, Any]
"""Figures of one line of a table, as JSON values."""
type Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Of each column the figure that it shows, its title, and how the figure is written; None is left blank."""
type Cases = Mapping[str, Callable[[argparse.Namespace], Iterable[Row]]]
"""The parts of a benchmark by name: from the options of the command line to rows."""


def machine() -> dict[str, str]:
    """Names the machine that the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "date": time.strftime("%Y-%m-%d"),
    }


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a benchmark.

    Attributes:
        text: the table, and sentences beside it.
        note: how it was measured, without the machine.
        figures: the same as JSON values.
        facts: what it was measured on.
    """

    text: str
    note: str
    figures: Mapping[str, Any]
    facts: Mapping[str, str] = field(default_factory=machine)

    def __str__(self) -> str:
        return f"{self.text}\n\n{self.note}; {', '.join(f'{name} {value}' for name, value in self.facts.items())}."


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def table(columns: Columns, rows: Iterable[Row]) -> str:
    """Formats a Markdown table that reads well as plain text, too."""
    cells = [[title for title, _ in columns.values()]]
    for row in rows:
        cells.append(["" if row[key] is None else written(row[key]) for key, (_, written) in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns the median of the ratios of turns: what else the machine does hits both sides of one alike."""
    return median(a / b for a, b in zip(first, second, strict=True))


def in_turns(options: argparse.Namespace, cases: Cases, columns: Columns) -> Findings:
    """Measures the chosen cases, or all."""
    rows: list[Row] = []
    for name in options.only or cases:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += cases[name](options)
    return Findings(
        text=table(columns, rows),
        note=f"Medians of {options.pairs} pairs in turns",
        figures={"rows": rows, "pairs": options.pairs},
    )
