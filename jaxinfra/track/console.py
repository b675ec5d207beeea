"""Prints run statistics, progress and the summary: as a progress bar on a terminal, as lines in a log file.

`log` of the progress bar only stores the metrics; a thread draws them four times a second, whatever the step time.
"""

import math
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any, override

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.formatting import (
    format_count,
    format_duration,
    format_number,
    format_percent,
    metric_label,
    summary_rows,
)

_REFRESH_PER_S = 4
_LOG_WIDTH = 110  # characters of a table in a log file
_MIN_BAR_WIDTH = 12  # characters

# Format and column width of each metric; "_per_s" is the suffix of several.
_COLUMNS = {
    "loss": ("{:.4f}".format, 7),
    "lr": ("{:.1e}".format, 7),
    "grad_norm": ("{:.2f}".format, 5),
    "_per_s": (format_count, 9),
    "mfu": (format_percent, 5),
}


def stdout_console() -> Console:
    """Returns a console on standard output; it is interactive on a terminal that supports cursor movement."""
    on_terminal = sys.stdout.isatty()
    console = Console(width=None if on_terminal else _LOG_WIDTH, highlight=False)
    console.is_interactive = on_terminal and not console.is_dumb_terminal
    return console


def statistics_table(statistics: RunStatistics) -> RenderableType:
    """Makes the table that is printed before the first step."""
    table = titled_table("Run statistics", "statistic")
    table.add_column("value", justify="right")
    table.add_column("unit or formula", style="dim")
    for name, (value, unit) in statistics.items():
        table.add_row(Text(name), Text(format_number(value)), Text(unit))
    return table


def summary_table(values: Mapping[str, Any]) -> RenderableType:
    """Makes the table that is printed after the last step."""
    table = titled_table("Summary", "")
    table.show_header = False
    table.add_column(overflow="fold")
    for label, value in summary_rows(values):
        table.add_row(Text(label), Text(value))
    return table


def titled_table(title: str, *columns: str | Column) -> Table:
    """Makes an empty table in the style of all tables."""
    return Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")


class RunProgress:
    """Keeps the newest value of each metric and the completed steps, and estimates the remaining time."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.completed_steps = start_step
        self.metrics: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # completed steps and time at the first log
        self._now_s = 0.0

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores the metrics of one step."""
        self.completed_steps = max(self.completed_steps, step + 1)
        self.metrics = {**self.metrics, **metrics}  # a new dict: the drawing thread may be reading the old one
        self._now_s = time.monotonic()
        if self._first is None:
            self._first = (self.completed_steps, self._now_s)  # after compilation, which is not part of the speed

    def eta_s(self) -> float:
        """Returns the remaining seconds at the mean speed since the first log; NaN until the second log."""
        if self._first is None or self.completed_steps == self._first[0]:
            return math.nan
        s_per_step = (self._now_s - self._first[1]) / (self.completed_steps - self._first[0])
        return s_per_step * (self.total_steps - self.completed_steps)

    def steps(self) -> str:
        """Returns "120/400", padded to a constant width."""
        total = str(self.total_steps)
        return f"{self.completed_steps:>{len(total)}}/{total}"


class ConsoleTracker(Tracker):
    """Prints run statistics at the start and the summary at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = RunProgress(0, 0)

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        self._progress = RunProgress(start_step, total_steps)
        self._console.print(statistics_table(statistics))

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.update(step, metrics)

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        self.close()
        self._console.print(summary_table(values))


class PlainTextTracker(ConsoleTracker):
    """Prints a line with fixed columns at the first step, every `log_every` steps, and the last step."""

    def __init__(self, console: Console, log_every: int) -> None:
        super().__init__(console)
        self._log_every = log_every
        self._printed = 0  # completed steps at the last line
        self._first = True

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        if any(name.startswith("eval/") for name in metrics):  # an evaluation has its own line
            self._line(f"{name} {value:.4f}" for name, value in metrics.items())
        elif self._due(step + 1):
            self._first, self._printed = False, step + 1
            self._line(self._columns())

    def _due(self, completed: int) -> bool:
        regular = completed % self._log_every == 0 or completed - self._printed >= self._log_every
        return self._first or regular or completed == self._progress.total_steps

    def _columns(self) -> list[str]:
        metrics = self._progress.metrics
        cells = [
            f"{metric_label(name)} {formatter(value):>{width}}"
            for key, (formatter, width) in _COLUMNS.items()
            for name, value in metrics.items()
            if name == key or (key == "_per_s" and name.endswith(key))  # tokens_per_s, images_per_s
        ]
        return [*cells, f"eta {format_duration(self._progress.eta_s()):>7}"]

    def _line(self, cells: Iterable[str]) -> None:
        print("  ".join([f"step {self._progress.steps()}", *cells]), file=self._console.file, flush=True)


class ProgressBarTracker(ConsoleTracker):
    """Draws one line at the bottom of a terminal; other output scrolls above it."""

    _live: Live | None = None

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        super().start(record, statistics, start_step=start_step, total_steps=total_steps)
        self._live = Live(
            console=self._console, get_renderable=self._draw, refresh_per_second=_REFRESH_PER_S, transient=True
        )
        self._live.start()

    @override
    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()  # restores the cursor

    def _draw(self) -> RenderableType:
        cells = [self._progress.steps(), *self._cells()]
        available = self._console.width - _MIN_BAR_WIDTH
        while len(cells) > 1 and sum(len(cell) + 2 for cell in cells) > available:
            del cells[-1]
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(ratio=1)
        for _ in cells:
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self._progress.total_steps, 1), completed=self._progress.completed_steps)
        grid.add_row(bar, *(Text(cell) for cell in cells))
        return grid

    def _cells(self) -> list[str]:
        """Returns the cells after the bar; a narrow terminal drops the last ones."""
        metrics = self._progress.metrics
        cells = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else ["compiling"]
        cells.append(f"eta {format_duration(self._progress.eta_s())}")
        cells += [
            f"{format_count(value)} {metric_label(name)}" for name, value in metrics.items() if name.endswith("_per_s")
        ]
        if "mfu" in metrics:
            cells.append(f"mfu {format_percent(metrics['mfu'])}")
        evaluation = {name: value for name, value in metrics.items() if name.startswith("eval/")}
        return cells + [f"{metric_label(name.replace('/', ' '))} {value:.4f}" for name, value in evaluation.items()]
