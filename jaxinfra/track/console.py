"""What a person at the terminal sees: derived numbers, progress, and the summary at the end.

Two trackers, for two kinds of output: `Bar` redraws one line on a terminal, `Plain` prints lines that read
well in a log file. Not the record of a run: that is metrics.jsonl. Invariant: `log` only takes note; the bar
is drawn by a thread four times a second, whatever the speed of the steps.
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
from rich.table import Table
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
_LOG_WIDTH = 110  # characters of a table in a log file, which has no width of its own
_MIN_BAR = 12  # characters

# End of a metric's name: how it is written, and its width in a column.
_COLUMNS = {
    "loss": ("{:.4f}".format, 7),
    "lr": ("{:.1e}".format, 7),
    "grad_norm": ("{:.2f}".format, 5),
    "_per_s": (format_count, 9),
    "mfu": (format_percent, 5),
}


def stdout_console() -> Console:
    """Returns a console on standard output; it is interactive on a terminal that can move its cursor."""
    on_terminal = sys.stdout.isatty()
    console = Console(width=None if on_terminal else _LOG_WIDTH, highlight=False)
    console.is_interactive = on_terminal and not console.is_dumb_terminal
    return console


def statistics_table(derived: RunStatistics) -> RenderableType:
    """Lays out the derived numbers of a run, to be printed before its first step."""
    table = titled_table("Derived numbers", "number")
    table.add_column("value", justify="right")
    table.add_column("unit or how", style="dim")
    for name, (value, how) in derived.items():
        table.add_row(Text(name), Text(format_number(value)), Text(how))
    return table


def summary_table(values: Mapping[str, Any]) -> RenderableType:
    """Lays out the summary of a run, to be printed after its last step."""
    table = titled_table("Summary", "")
    table.show_header = False
    table.add_column(overflow="fold")
    for label, value in summary_rows(values):
        table.add_row(Text(label), Text(value))
    return table


def titled_table(title: str, *columns: str) -> Table:
    """Makes an empty table in the style of all that are printed."""
    return Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")


class RunProgress:
    """The newest value of each metric, the steps done, and the time that the rest will take."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self.total_steps = total_steps
        self.done = start_step
        self.metrics: dict[str, float] = {}
        self._first: tuple[int, float] | None = None  # steps done and time at the first log
        self._now_s = 0.0

    def take(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes note of metrics of `step`."""
        self.done = max(self.done, step + 1)
        self.metrics = {**self.metrics, **metrics}  # a new dict: the drawing thread may read the old one
        self._now_s = time.monotonic()
        if self._first is None:
            self._first = (self.done, self._now_s)  # compilation is over by now, so it does not count

    def eta_s(self) -> float:
        """Returns the seconds left at the mean speed since the first log; NaN before there is a speed."""
        if self._first is None or self.done == self._first[0]:
            return math.nan
        s_per_step = (self._now_s - self._first[1]) / (self.done - self._first[0])
        return s_per_step * (self.total_steps - self.done)

    def steps(self) -> str:
        """Returns "120/400", as wide at every step."""
        total = str(self.total_steps)
        return f"{self.done:>{len(total)}}/{total}"


class ConsoleTracker(Tracker):
    """Prints the derived numbers at the start and the summary at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = RunProgress(0, 0)

    @override
    def start(self, record: Mapping[str, Any], derived: RunStatistics, *, start_step: int, total_steps: int) -> None:
        self._progress = RunProgress(start_step, total_steps)
        self._console.print(statistics_table(derived))

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._progress.take(step, metrics)

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        self.close()
        self._console.print(summary_table(values))


class PlainTextTracker(ConsoleTracker):
    """Prints a line with fixed columns at the first step, then every `log_every` steps, and at the last."""

    def __init__(self, console: Console, log_every: int) -> None:
        super().__init__(console)
        self._log_every = log_every
        self._printed = 0  # steps done when the last line was printed
        self._first = True

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        if any(name.startswith("eval/") for name in metrics):  # has its own line, and is always due
            self._line(f"{name} {value:.4f}" for name, value in metrics.items())
        elif self._due(step + 1):
            self._first, self._printed = False, step + 1
            self._line(self._columns())

    def _due(self, done: int) -> bool:
        on_grid = done % self._log_every == 0 or done - self._printed >= self._log_every
        return self._first or on_grid or done == self._progress.total_steps

    def _columns(self) -> list[str]:
        metrics = self._progress.metrics
        cells = [
            f"{metric_label(name)} {written(value):>{width}}"
            for end, (written, width) in _COLUMNS.items()
            for name, value in metrics.items()
            if name == end or (end == "_per_s" and name.endswith(end))
        ]
        return [*cells, f"eta {format_duration(self._progress.eta_s()):>7}"]

    def _line(self, cells: Iterable[str]) -> None:
        print("  ".join([f"step {self._progress.steps()}", *cells]), file=self._console.file, flush=True)


class ProgressBarTracker(ConsoleTracker):
    """Draws one line at the bottom of a terminal; everything else that is printed scrolls above it."""

    _live: Live | None = None

    @override
    def start(self, record: Mapping[str, Any], derived: RunStatistics, *, start_step: int, total_steps: int) -> None:
        super().start(record, derived, start_step=start_step, total_steps=total_steps)
        self._live = Live(
            console=self._console, get_renderable=self._draw, refresh_per_second=_REFRESH_PER_S, transient=True
        )
        self._live.start()

    @override
    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.stop()  # gives the cursor back

    def _draw(self) -> RenderableType:
        cells = [self._progress.steps(), *self._cells()]
        room = self._console.width - _MIN_BAR
        while len(cells) > 1 and sum(len(cell) + 2 for cell in cells) > room:
            del cells[-1]
        grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
        grid.add_column(ratio=1)
        for _ in cells:
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self._progress.total_steps, 1), completed=self._progress.done)
        grid.add_row(bar, *(Text(cell) for cell in cells))
        return grid

    def _cells(self) -> list[str]:
        """Returns the cells behind the bar; the last ones give way first on a narrow terminal."""
        metrics = self._progress.metrics
        cells = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else ["compiling"]
        cells.append(f"eta {format_duration(self._progress.eta_s())}")
        cells += [
            f"{format_count(value)} {metric_label(name)}" for name, value in metrics.items() if name.endswith("_per_s")
        ]
        if "mfu" in metrics:
            cells.append(f"mfu {format_percent(metrics['mfu'])}")
        scores = (item for item in metrics.items() if item[0].startswith("eval/"))
        return cells + [f"{metric_label(name.replace('/', ' '))} {value:.4f}" for name, value in scores]
