"""What a benchmark finds: a table, a line that says what it was measured on, and the figures as JSON."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
    facts: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.text}\n\n{self.note}; {', '.join(f'{name} {value}' for name, value in self.facts.items())}."


def machine() -> dict[str, str]:
    """Names the machine that the figures were measured on."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def table(cells: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table that reads well as plain text, too; the first row is its head."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
