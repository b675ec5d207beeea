"""Prints run statistics, progress and the summary: as a progress bar on a terminal, as lines in a log file.

`log` of the progress bar only stores the metrics; a thread draws them four times a second, whatever the step time.
Lines for evaluations and saves stay above the bar.
"""

import math
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, override

from rich import box
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Column, Table
from rich.text import Text

from jaxinfra.command import command_line
from jaxinfra.config.source import COMMAND_LINE
from jaxinfra.config.view import config_leaves
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_metric,
    format_number,
    format_percent,
    format_short,
    metric_label,
    shown_metrics,
    summary_rows,
)

_REFRESH_PER_S = 4
_LOG_WIDTH = 110  # characters of a table in a log file
_ANY_WIDTH = 100_000  # characters
_BAR_WIDTH = 40  # characters, if the terminal is wide enough
_MIN_BAR_WIDTH = 12  # characters
_LONGEST_WORD = 40  # characters of a wrapped column; a longer path does not push other columns out
_HEADLINES = ("devices", "parameters", "{}s a step", "steps", "{}s", "epochs", "FLOPs", "state a device", "time")
"""Statistics that are printed at the start of a run; {} is the modality. `show` prints all."""

# Format and column width of each metric; "_per_s" is the suffix of several.
_COLUMNS = {
    "loss": (format_metric, 7),
    "lr": ("{:.1e}".format, 7),
    "grad_norm": ("{:.2f}".format, 5),
    "_per_s": (format_count, 9),
    "mfu": (format_percent, 5),
    "device_in_use_bytes": (format_bytes, 10),
    "rss_bytes": (format_bytes, 10),
}
_LABELS = {"device_in_use_bytes": "memory", "rss_bytes": "host memory"}


class _TrainingConsole(Console):
    """A console whose closed pipe, as of `| head`, silences it but does not end the training."""

    @override
    def on_broken_pipe(self) -> None:
        self.quiet = True


def stdout_console() -> Console:
    """Returns a console on standard output; it is interactive on a terminal that supports cursor movement."""
    on_terminal = sys.stdout.isatty()
    console = _TrainingConsole(width=None if on_terminal else _LOG_WIDTH, highlight=False)
    console.is_interactive = on_terminal and not console.is_dumb_terminal
    return console


def statistics_table(statistics: RunStatistics) -> Table:
    """Makes the table of all statistics, for `show`."""
    columns = Column("value", justify="right"), Column("unit or formula", style="dim", overflow="fold")
    table = titled_table("Run statistics", "statistic", *columns)
    for name, (value, unit) in statistics.items():
        table.add_row(Text(name), Text(format_number(value)), Text(unit))
    return table


def headline_table(statistics: RunStatistics) -> Table:
    """Makes the table that is printed before the first step: at most 9 rows of rounded numbers."""
    modality = next((name.removesuffix("s a step") for name in statistics if name.endswith("s a step")), "token")
    columns = Column(), Column(justify="right", style="bold"), Column(style="dim", overflow="fold")
    table = Table(*columns, box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in (headline.format(modality) for headline in _HEADLINES):
        if name in statistics:
            value, note = statistics[name]
            text = format_number(value) if isinstance(value, str) or abs(value) < 10_000 else format_short(value)
            table.add_row(Text(name), Text(text), Text(note))
    return table


def summary_table(values: Mapping[str, Any]) -> Table:
    """Makes the table that is printed after the last step."""
    table = titled_table("Summary", "", "")
    table.show_header = False
    for label, value in summary_rows(values):
        table.add_row(Text(label), Text(value))
    return table


def titled_table(title: str, *columns: str | Column) -> Table:
    """Makes an empty table in the style of all tables."""
    return Table(*columns, box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")


def fitted_table(
    console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[str], wrapped: str = ""
) -> Table:
    """Makes a table of the columns that fit beside those before them, most important first; a caption names the rest.

    A pipe or a file gets all, with one line for a row. `texts` begin on the left; `wrapped` wraps on a terminal.
    """

    def table_of(shown: Iterable[str]) -> Table:
        table = titled_table("")
        for name in shown:
            overflow = "fold" if name == wrapped and console.is_terminal else "ellipsis"
            least = _LONGEST_WORD if overflow == "fold" else None
            table.add_column(name, justify="left" if name in texts else "right", overflow=overflow, min_width=least)
        for row in (dict(zip(headers, row, strict=True)) for row in rows):
            cells = (row[name] if console.is_terminal else row[name].replace("\n", ", ") for name in shown)
            table.add_row(*map(Text, cells))
        return table

    shown, left_out = list[str](), list[str]()
    for name, *cells in zip(headers, *rows, strict=True):
        fits = not (shown and console.is_terminal) or _needed_width(console, table_of([*shown, name])) <= console.width
        if any(cells):
            (shown if fits else left_out).append(name)
    table = table_of(shown)
    if left_out:
        table.caption, table.caption_justify = f"a wider terminal also shows {', '.join(left_out)}", "left"
    return table


def print_table(console: Console, table: Table) -> None:
    """Prints a table without cutting anything: only columns with overflow="fold" wrap, between words.

    If the others do not fit, the lines are longer than those of the terminal, which breaks them.
    """
    needed = _needed_width(console, table)
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def _needed_width(console: Console, table: Table) -> int:
    """Gives each column the width that it needs at least, or a smaller one that it has; returns that of the table."""
    options, broken = console.options.update(width=_ANY_WIDTH), 0  # characters of words that are broken
    for column in table.columns:
        column.no_wrap = column.overflow != "fold"
        sizes = [console.measure(cell, options=options) for cell in (column.header, *column.cells)]
        needed = max(size.maximum if column.no_wrap else size.minimum for size in sizes)
        column.min_width = min(needed, column.min_width or needed)
        broken += needed - column.min_width
    return console.measure(table, options=options).minimum - broken


class ConsoleTracker(Tracker):
    """Prints the run and its statistics at the start, evaluations and saves as lines, and the summary at the end.

    It keeps what the lines of a subclass show: the newest value of each metric, and the progress.
    """

    def __init__(self, console: Console, run_dir: str | Path) -> None:
        self._console, self._run_dir = console, run_dir
        self._metrics: Mapping[str, float] = {}
        self._completed_steps = self._total_steps = 0
        self._start_s = self._now_s = time.monotonic()
        self._first: tuple[int, float] | None = None  # completed steps and time at the end of the first step

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        self._completed_steps, self._total_steps, self._start_s = start_step, total_steps, time.monotonic()
        text = Text(announcement(self._run_dir, record, start_step, total_steps), style="bold")
        self._console.print(text, soft_wrap=True)
        print_table(self._console, headline_table(statistics))
        more = f"more numbers: {command_line('show', str(self._run_dir))}"
        self._console.print(Text(more, style="dim"), soft_wrap=True)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = shown_metrics(metrics)
        self._metrics = {**self._metrics, **shown}  # a new dict: the drawing thread may be reading the old one
        scores = {name.removeprefix("eval/"): value for name, value in metrics.items() if name.startswith("eval/")}
        if scores:
            cells = [f"{metric_label(name)} {format_metric(value)}" for name, value in scores.items()]
            self._line(step, ["validation", *cells], style="green")

    @override
    def finish_step(self, step: int) -> None:
        self._completed_steps, self._now_s = max(self._completed_steps, step), time.monotonic()
        if self._first is None:
            self._first = (self._completed_steps, self._now_s)  # after compilation, which is not part of the speed

    def eta_s(self) -> float:
        """Returns the remaining seconds at the mean speed since the first step; NaN until the second."""
        if self._first is None or self._completed_steps == self._first[0]:
            return math.nan
        s_per_step = (self._now_s - self._first[1]) / (self._completed_steps - self._first[0])
        return s_per_step * (self._total_steps - self._completed_steps)

    @override
    def log_save(self, step: int) -> None:
        self._line(step, [f"saving {self._run_dir}/checkpoints/{step}"], style="dim")

    @override
    def log_note(self, step: int, text: str) -> None:
        self._line(step, [text])

    @override
    def log_profile(self, step: int, text: str) -> None:
        self._console.print(Text(text.rstrip("\n")), soft_wrap=True)

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        self.close()
        print_table(self._console, summary_table(values))

    @override
    def abandon(self) -> None:
        self.close()

    def _line(self, completed_steps: int, cells: Iterable[str], style: str = "") -> None:
        text = "  ".join([f"step {self._steps(completed_steps)}", *cells])
        self._console.print(Text(text, style=style), soft_wrap=True)

    def _steps(self, completed_steps: int) -> str:
        """Returns "120/400", padded to a constant width."""
        total = str(self._total_steps)
        return f"{completed_steps:>{len(total)}}/{total}"


def announcement(run_dir: str | Path, record: Mapping[str, Any], start_step: int, total_steps: int) -> str:
    """Returns "new run runs/x: train.steps=400" with what the command line has set, or "resuming runs/x at ...".

    A run that starts again without a checkpoint resumes at step 0, for the reason in its record.
    Both name the weights that the run began with: "init=runs/y@200".
    """
    config = config_leaves(record.get("config", {}))
    words = [word.partition("=")[0] for word in record.get("command", ())]  # origins leave out classes
    changed = [path for path, origin in record.get("origins", {}).items() if origin == COMMAND_LINE]
    changed += [path for path in words if path in config and path not in changed]
    values = {path: config[path] for path in changed if path in config and path not in ("name", "init")}
    if init := record.get("init"):
        values["init"] = f"{init['run']}@{init['step']}" if init["step"] else init["run"]  # published weights have none
    if not (start_step or record.get("resumed_from")):
        return f"new run {run_dir}{':' * bool(values)}{''.join(f' {path}={text}' for path, text in values.items())}"
    notes = [record.get("resumed_from"), f"which began with init={values['init']}" if init else None]
    return ", ".join([f"resuming {run_dir} at step {start_step} of {total_steps}", *filter(None, notes)])


class PlainTextTracker(ConsoleTracker):
    """Prints a line with fixed columns at the first step, every `log_every` steps, and the last step."""

    def __init__(self, console: Console, run_dir: str | Path, log_every: int) -> None:
        super().__init__(console, run_dir)
        self._log_every = log_every
        self._printed: int | None = None  # completed steps at the last line

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        super().log(step, metrics)
        if not any(name.startswith("eval/") for name in metrics) and self._due(step):
            self._printed = step
            self._line(step, self._columns())

    def _due(self, completed: int) -> bool:
        if self._printed is None or completed == self._total_steps:
            return True
        # A run that logs at other steps than multiples of `log_every` prints after as many steps.
        return completed % self._log_every == 0 or completed - self._printed >= self._log_every

    def _columns(self) -> list[str]:
        metrics = self._metrics
        cells = []
        for key, (formatter, width) in _COLUMNS.items():
            for name, value in metrics.items():
                if name == key or (key == "_per_s" and name.endswith(key)):  # tokens_per_s, images_per_s
                    cells.append(f"{_LABELS.get(name, metric_label(name))} {formatter(value):>{width}}")
        return [*cells, f"eta {format_duration(self.eta_s()):>7}"]


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
        if self._first is None:  # the first step is compiled
            text = Text(f"compiling the train step  {format_duration(time.monotonic() - self._start_s)}")
            return Spinner("dots", text)
        cells = [self._steps(self._completed_steps), *self._cells()]
        while (used := sum(len(cell) + 2 for cell in cells)) > self._console.width - _MIN_BAR_WIDTH and len(cells) > 1:
            del cells[-1]
        grid = Table.grid(padding=(0, 2, 0, 0))
        width = min(_BAR_WIDTH, self._console.width - used - 2)
        bar = ProgressBar(total=max(self._total_steps, 1), completed=self._completed_steps, width=width)
        grid.add_row(bar, *(Text(cell, no_wrap=True) for cell in cells))
        return grid

    def _cells(self) -> list[str]:
        """Returns the cells after the bar; a narrow terminal drops the last ones."""
        metrics = self._metrics
        cells = [f"loss {format_metric(metrics['loss'])}"] if "loss" in metrics else []
        cells.append(f"eta {format_duration(self.eta_s())}")
        cells += [
            f"{format_count(value)} {metric_label(name)}" for name, value in metrics.items() if name.endswith("_per_s")
        ]
        if "mfu" in metrics:
            cells.append(f"mfu {format_percent(metrics['mfu'])}")
        memory = metrics.get("device_in_use_bytes", metrics.get("rss_bytes"))
        return cells if memory is None else [*cells, format_bytes(memory)]
