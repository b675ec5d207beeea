"""Lays out the time line of the report: what a run did over all its starts, as columns of equal time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jaxinfra.track.formatting import format_counts, format_duration, format_energy, format_number, format_percent
from jaxinfra.track.goodput import CLASSES, Goodput

COLUMNS, HEIGHT = 120, 100
"""Number of columns, each one unit wide, and their height."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A part of a column, or of several equal ones: position and size in units, class of time, and text."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The time line of a run."""

    bars: Sequence[Bar]  # the parts of the columns
    starts: Sequence[float]  # the position of each start after the first
    processes: str  # of each start, in words; "" if all have the same number
    legend: Sequence[tuple[str, str]]  # class and label, of those that the run has
    end: str  # the time at the right end, in words
    text: str  # what the picture shows, in words
    rows: Sequence[tuple[str, str, str]]  # of the table: class, seconds, share
    energy: str  # in words; "" if it was not measured


def timeline(run: Goodput) -> Timeline:
    """Divides the time of a run into equal columns; the height of a bar is the share of its class in the column."""
    width_s = run.wall_s / COLUMNS or 1.0
    shares: list[dict[str, float]] = [{} for _ in range(COLUMNS)]
    for interval in run.intervals:
        length_s = interval.end_s - interval.begin_s
        first, last = (min(int(each / width_s), COLUMNS - 1) for each in (interval.begin_s, interval.end_s))
        for column in range(first, last + 1) if length_s else ():
            overlap_s = min(interval.end_s, (column + 1) * width_s) - max(interval.begin_s, column * width_s)
            for kind, seconds in interval.seconds.items():
                part = shares[column].get(kind, 0.0) + seconds * max(0.0, overlap_s) / length_s / width_s
                shares[column][kind] = part
    legend = [(kind, label) for kind, label in CLASSES.items() if kind in run.seconds]
    rows = [
        (label, format_number(run.seconds[kind]), format_percent(run.seconds[kind] / run.wall_s))
        for kind, label in legend
    ]
    starts = "1 start" if run.attempts == 1 else f"{run.attempts} starts"
    largest = sorted(((run.seconds[kind], label) for kind, label in legend), reverse=True)
    listed = ", ".join(f"{label} {format_percent(seconds / run.wall_s)}" for seconds, label in largest)
    return Timeline(
        bars=_merged([bar for column, share in enumerate(shares) for bar in _column(column, share)]),
        starts=[round(start_s / width_s, 2) for start_s in run.starts_s[1:]],
        processes=format_counts(run.processes),
        legend=legend,
        end=format_duration(run.wall_s),
        text=f"{format_duration(run.wall_s)} in {starts}, goodput {format_percent(run.fraction)}: {listed}",
        rows=rows,
        energy=format_energy(run.joules, run.planned_joules),
    )


def _column(column: int, share: Mapping[str, float]) -> list[Bar]:
    bars, y = [], float(HEIGHT)
    for kind, label in CLASSES.items():
        if height := HEIGHT * share.get(kind, 0.0):
            y -= height
            text = f"{label} {format_percent(share[kind])}"
            bars.append(Bar(x=column, y=round(y, 2), width=1, height=round(height, 2), kind=kind, text=text))
    return bars


def _merged(bars: Sequence[Bar]) -> list[Bar]:
    """Makes one bar of neighbors that look the same."""
    merged: dict[tuple[str, float, float], list[Bar]] = {}  # of each look, from left to right
    for bar in bars:
        alike = merged.setdefault((bar.kind, bar.y, bar.height), [])
        if alike and alike[-1].x + alike[-1].width == bar.x:
            alike[-1] = replace(alike[-1], width=alike[-1].width + 1)
        else:
            alike.append(bar)
    return [bar for alike in merged.values() for bar in alike]
