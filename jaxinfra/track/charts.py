"""Draws line charts as HTML figures with inline SVG, which need no script.

All text is escaped, and every spike of the data stays visible. All charts of a page have the same horizontal axis, so
that the page's script can show the values at one step in all of them.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

from jaxinfra.track.formatting import format_number

type Point = tuple[int, float]

WIDTH, HEIGHT = 560, 200  # of the drawing, in SVG units
LEFT, RIGHT, TOP, BOTTOM = 58, 552, 12, 174  # edges of the plot in the drawing

_BUCKETS = 600  # about one per horizontal unit of the plot
_LOG_RATIO = 1000  # largest over smallest value; beyond it a linear axis hides the small values


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One line chart."""

    title: str  # what is measured
    unit: str = ""  # of the drawn values; "" for a plain number
    lines: Mapping[str, Sequence[Point]]  # one to four, by label, with rising steps; values may be NaN or infinite
    scale: Literal["linear", "auto"] = "linear"  # vertical; "auto" is logarithmic if values span three decades
    zero: bool = False  # whether the vertical axis includes zero
    divisor: float = 1.0  # converts values to `unit`


@dataclass(frozen=True, kw_only=True)
class _Axis:
    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def y(self, value: float) -> float:
        low, high, v = (math.log10(each) if self.log else each for each in (self.low, self.high, value))
        return BOTTOM - (BOTTOM - TOP) * (v - low) / (high - low)


def downsample(points: Sequence[Point], buckets: int = _BUCKETS) -> list[Point]:
    """Keeps at most four points of each of `buckets` equal parts: first, smallest, largest, and one NaN or infinity.

    Neither spikes nor gaps are lost. The last point of all is kept, too.
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in range(buckets):
        part = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        finite = [i for i in part if math.isfinite(points[i][1])]
        first_nonfinite = [i for i in part if not math.isfinite(points[i][1])][:1]
        chosen = {part.start, *first_nonfinite}
        if finite:
            chosen |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(chosen)]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def render_chart(chart: Chart, steps: tuple[int, int]) -> str:
    """Draws a chart as one HTML `figure`; `steps` are the first and the last of its horizontal axis."""
    lines = [
        (label, [(step, value / chart.divisor) for step, value in downsample(points)])
        for label, points in chart.lines.items()
        if points
    ]
    unit = f'<span class="unit">{escape(chart.unit)}</span>' if chart.unit else ""
    legend = "".join(  # labels with the last values; the script shows the values at the pointer in their place
        f'<span class="key s{i}">{escape(label)} <b>{escape(format_number(points[-1][1]))}</b></span>'
        for i, (label, points) in enumerate(lines)
    )
    title = f"<h3>{escape(chart.title)}</h3>"
    heading = f'<figcaption>{title}{unit}<span class="legend">{legend}</span></figcaption>'
    if not lines:
        return f'<figure>{heading}<p class="empty">No values logged.</p></figure>'
    axis = _axis([value for _, points in lines for _, value in points], chart)
    body = _grid(axis, steps) + "".join(_line(i, points, axis, steps) for i, (_, points) in enumerate(lines))
    data = escape(json.dumps(_data(lines, steps), separators=(",", ":")))
    return (
        f'<figure data-chart="{data}">{heading}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)} over steps">'
        f'{body}<line class="rule" y1="{TOP}" y2="{BOTTOM}"/></svg></figure>'
    )


def _data(lines: Iterable[tuple[str, Sequence[Point]]], steps: tuple[int, int]) -> dict[str, object]:
    """Returns what the script needs to show the values at a step."""
    series = [
        [[step, float(f"{value:.6g}") if math.isfinite(value) else str(value)] for step, value in points]
        for _, points in lines
    ]
    return {"steps": steps, "edges": [LEFT / WIDTH, RIGHT / WIDTH], "width": WIDTH, "series": series}


def _x(step: int, steps: tuple[int, int]) -> float:
    first, last = steps
    return LEFT + (RIGHT - LEFT) * (step - first) / (last - first) if last > first else (LEFT + RIGHT) / 2


def _line(i: int, points: Sequence[Point], axis: _Axis, steps: tuple[int, int]) -> str:
    """Draws one series: a path through consecutive finite points, a dot for a lone one, a mark for NaN or infinity."""
    parts: list[str] = []
    for finite, group in groupby(points, key=lambda point: math.isfinite(point[1])):
        if finite:
            coordinates = [(f"{_x(step, steps):.1f}", f"{axis.y(value):.1f}") for step, value in group]
            (cx, cy), path = coordinates[0], "L".join(map(" ".join, coordinates))
            dot = f'<circle class="s{i}" cx="{cx}" cy="{cy}" r="3"/>'
            parts.append(dot if len(coordinates) == 1 else f'<path class="s{i}" d="M{path}"/>')
            continue
        for step, value in group:
            mark = f"M{_x(step, steps):.1f} {TOP}l-3.5 -7h7z"
            parts.append(f'<path class="broken" d="{mark}"><title>step {step}: {value}</title></path>')
    return "".join(parts)


def _grid(axis: _Axis, steps: tuple[int, int]) -> str:
    parts = []
    for tick in axis.ticks:
        y = f"{axis.y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy="4" text-anchor="end">{_tick_label(tick)}</text>')
    first, last = steps
    for tick in _ticks(first, last, 5) if last > first else (float(first),):
        if tick.is_integer():
            x = f"{_x(int(tick), steps):.1f}"
            parts.append(f'<text x="{x}" y="{BOTTOM + 20}" text-anchor="middle">{int(tick):,}</text>')
    return "".join(parts)


def _tick_label(value: float) -> str:
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.4g}"


def _axis(values: Sequence[float], chart: Chart) -> _Axis:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if chart.scale == "auto" and low > 0 and high / low >= _LOG_RATIO:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = tuple(10.0**decade for decade in decades[:: math.ceil(len(decades) / 5)])
        return _Axis(low=10.0 ** decades[0], high=10.0 ** decades[-1], log=True, ticks=ticks)
    low = min(low, 0.0) if chart.zero else low
    if high == low:
        half = abs(low) / 2 or 1.0
        low, high = low - half, high + half
    pad = 0.04 * (high - low)
    low = low if chart.zero and low == 0 else low - pad
    high += pad
    return _Axis(low=low, high=high, log=False, ticks=_ticks(low, high, 5))


def _ticks(low: float, high: float, about: int) -> tuple[float, ...]:
    """Returns about `about` values from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)  # include ticks at low and high
    digits = max(0, -math.floor(math.log10(step)))  # rounding removes errors such as 0.30000000000000004
    return tuple(round(i * step, digits) for i in range(first, last + 1))
