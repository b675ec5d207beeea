"""The rows of the fault matrix: what is injected, and what a run must do then."""

import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import tests.faults
from tests.faults.harness import Harness, NotTried


@dataclass(frozen=True, kw_only=True)
class Row:
    """One fault, or several that are injected into the same runs.

    Attributes:
        numbers: in the matrix.
        fault: what is injected.
        must: what the run must do.
        inject: injects it and checks the outcome; returns what happened, or raises, NotTried if it cannot be injected.
    """

    numbers: Sequence[int]
    fault: str
    must: str
    inject: Callable[[Harness], str]

    @property
    def label(self) -> str:
        """Its numbers, such as 1-2."""
        first, last = self.numbers[0], self.numbers[-1]
        return str(first) if first == last else f"{first}-{last}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a row: its verdict, what happened or what went wrong, and the seconds that it took."""

    row: Row
    text: str
    verdict: Literal["survived", "not tried", "failed"]
    seconds: float


_rows: list[Row] = []  # the modules add theirs when they are imported


def all_rows() -> list[Row]:
    """Returns the rows in the order of their numbers."""
    for module in pkgutil.iter_modules(tests.faults.__path__):
        if not module.name.startswith("test_"):
            importlib.import_module(f"tests.faults.{module.name}")
    return sorted(_rows, key=lambda row: row.numbers[0])


def row(*numbers: int, fault: str, must: str) -> Callable[[Callable[[Harness], str]], Callable[[Harness], str]]:
    """Adds a row to the matrix, which this function injects and checks."""

    def add(inject: Callable[[Harness], str]) -> Callable[[Harness], str]:
        _rows.append(Row(numbers=numbers, fault=fault, must=must, inject=inject))
        return inject

    return add


def run_rows(harness: Harness, rows: Iterable[Row]) -> Iterator[Outcome]:
    """Injects rows one after another."""
    for each in rows:
        start_s = time.monotonic()
        try:
            text, verdict = each.inject(harness), "survived"
        except NotTried as reason:
            text, verdict = str(reason), "not tried"
        except Exception as error:  # shown in the table; the others are tried all the same
            text, verdict = f"{type(error).__name__}: {error}", "failed"
        yield Outcome(row=each, text=text, verdict=verdict, seconds=time.monotonic() - start_s)


def markdown_table(outcomes: Iterable[Outcome]) -> str:
    """Formats the outcomes as a table."""
    lines = ["| row | injected | must | happened | seconds |", "| ---: | --- | --- | --- | ---: |"]
    for each in outcomes:
        text = " ".join(each.text.split())[:200]
        happened = each.text if each.verdict == "survived" else f"**{each.verdict}**: {text}"
        cells = (each.row.label, each.row.fault, each.row.must, happened, f"{each.seconds:.0f}")
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)
