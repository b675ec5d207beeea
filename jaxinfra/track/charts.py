"""Chooses the charts of the report, and reduces each line to the points that a screen can show.

Steps are completed steps here, counted from 1, as in the console. `assets/report.js` draws the charts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from jaxinfra.track.formatting import bytes_unit, format_metric, format_number, metric_label, shown_metrics

_BUCKETS = 600  # of a line; a bucket keeps up to four points
_MEAN_POINTS = 300  # of a line of means, which is smooth
_MEAN_SHARE = 100  # a mean covers this part of the values on both sides
_MEAN_MIN_VALUES = 20  # fewer values are drawn without their mean
_MAX_DEVICE_LINES = 3
_MAX_OTHER_CHARTS = 24  # more metrics than these are only named below the charts
_NOT_CHARTED = ("step", "time_s")
# Metrics with a chart of their own, or in one with others; any other metric has a chart after these.
_KNOWN = ("loss", "lr", "grad_norm", "mfu", "step_time_s", "data_wait_s", "rss_bytes", "open_files", "threads")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The values of one metric of one run, by completed steps; they may be NaN or infinite."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RunCurves:
    """The curves of a run, and the units of its axes."""

    name: str  # for the legend
    curves: Mapping[str, Curve]  # by metric
    baselines: Mapping[str, Mapping[str, float]]  # by metric: values of simple models, by name
    time_s: Curve  # the training time at each logged step
    units_per_step: int | None  # tokens or images of a step; None if not known
    units: str  # "tokens" or "images"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; `style` is "plain", "faint" (single values behind their mean), "mean", or "dots"."""

    label: str
    run: int
    color: int
    dash: int
    style: str
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: its lines, horizontal lines by label, whether its axis starts at 0, and whether it is of a metric."""

    title: str
    unit: str = ""
    zero: bool = False
    is_metric: bool = False
    lines: Sequence[Line]
    levels: Mapping[str, float]

    @property
    def not_finite(self) -> str:
        """Names the values that have no place in the chart; "" if there are none."""
        found = []
        for line in self.lines:
            broken = np.flatnonzero(~np.isfinite(line.curve.values)) if line.style != "mean" else []
            if len(broken):
                value, step = line.curve.values[broken[0]], line.curve.steps[broken[0]]
                more = f" and {len(broken) - 1:,} more times" if len(broken) > 1 else ""
                found.append(f"{line.label} is {value} at step {step:,}{more}")
        return "; ".join(found)


@dataclass(frozen=True, kw_only=True)
class Charts:
    """The charts of a page."""

    drawn: Sequence[Chart]  # the loss first
    constant: Sequence[tuple[str, str]]  # label and value of each line of the charts in which nothing changes, as text
    omitted: Sequence[str]  # metrics beyond the largest number of charts


def run_curves(
    name: str, rows: Sequence[Mapping[str, float]], record: Mapping[str, Any], summary: Mapping[str, Any]
) -> RunCurves:
    """Collects the curves of a run from the contents of metrics.jsonl, run.json and summary.json."""
    points: dict[str, tuple[list[int], list[float]]] = {}
    for row in map(shown_metrics, rows):
        for metric, value in row.items():
            steps, values = points.setdefault(metric, ([], []))
            steps.append(int(row["step"]))
            values.append(value)
    curves = {
        metric: Curve(steps=np.array(steps), values=np.array(values, float))
        for metric, (steps, values) in points.items()
    }
    derived = record.get("derived") or {}
    a_step = next((key for key in derived if key.endswith("s a step")), None)
    return RunCurves(
        name=name,
        curves={metric: curve for metric, curve in curves.items() if metric not in _NOT_CHARTED},
        baselines=summary.get("baselines") or record.get("baselines") or {},
        time_s=curves.get("time_s", Curve(steps=np.array([], int), values=np.array([]))),
        units_per_step=None if a_step is None else derived[a_step][0],
        units="units" if a_step is None else a_step.removesuffix(" a step"),
    )


def make_charts(runs: Sequence[RunCurves]) -> Charts:
    """Chooses the charts of one run, or of several to compare."""
    metrics = {metric: None for run in runs for metric in run.curves}
    evaluated = {metric: metric.removeprefix("eval/") for metric in metrics if metric.startswith("eval/")}
    speeds = [metric for metric in metrics if metric.endswith("_per_s")]
    devices = sorted(metric for metric in metrics if metric.startswith("device_") and metric.endswith("_bytes"))
    devices = devices[:_MAX_DEVICE_LINES]
    memory = {"rss_bytes": "host"} | {name: name.removesuffix("_bytes").replace("_", " ") for name in devices}
    sizes = np.concatenate([[1.0], *(run.curves[name].values for run in runs for name in memory if name in run.curves)])
    divisor, unit = bytes_unit(sizes[np.isfinite(sizes)].max())
    used = {*_KNOWN, *memory, *speeds, *evaluated, *evaluated.values()}
    others = sorted(metric for metric in metrics if metric not in used)
    charts = [
        _chart(runs, "Loss", {"loss": "training", "eval/loss": "validation"}, unit="nats", mean=True),
        *(
            _chart(runs, metric_label(name).capitalize(), {name: "training", metric: "validation"}, mean=True)
            for metric, name in evaluated.items()
            if name != "loss"
        ),
        _chart(runs, "Learning rate", {"lr": "learning rate"}, zero=True),
        _chart(runs, "Gradient norm", {"grad_norm": "norm"}, mean=True),
        _chart(runs, "Throughput", {name: metric_label(name) for name in speeds}, zero=True),
        _chart(runs, "MFU", {"mfu": "MFU"}, unit="%", zero=True, divisor=0.01),
        _chart(runs, "Step time", {"step_time_s": "step", "data_wait_s": "waiting for data"}, unit="s", zero=True),
        _chart(runs, "Memory", memory, unit=unit, zero=True, divisor=divisor),
        _chart(runs, "Open files and threads", {"open_files": "open files", "threads": "threads"}, zero=True),
        *(_chart(runs, name, {name: name}) for name in others[:_MAX_OTHER_CHARTS]),
    ]
    drawn = [chart for chart in charts[1:] if chart.levels or not all(map(_is_constant, chart.lines))]
    constant = [each for chart in charts[1:] if chart.lines and chart not in drawn for each in _constant_texts(chart)]
    return Charts(drawn=[charts[0], *drawn], constant=constant, omitted=others[_MAX_OTHER_CHARTS:])


def page_data(runs: Sequence[RunCurves], charts: Sequence[Chart]) -> dict[str, Any]:
    """Returns what report.js draws, as JSON values; NaN and infinities are strings."""
    return {
        "runs": [
            {"unitsPerStep": run.units_per_step, "clock": _points(run.time_s, _evenly(len(run.time_s.steps), _BUCKETS))}
            for run in runs
        ],
        "charts": [
            {
                "title": chart.title,
                "zero": chart.zero,
                "isMetric": chart.is_metric,
                "levels": [[label, _json_number(value, chart.is_metric)] for label, value in chart.levels.items()],
                "lines": [_line_data(line, max(_BUCKETS // len(runs), 100), chart.is_metric) for line in chart.lines],
            }
            for chart in charts
        ],
    }


def downsample(values: np.ndarray, buckets: int = _BUCKETS) -> np.ndarray:
    """Returns indices of values to draw: of each bucket the first, smallest and largest, and one NaN or infinity.

    The buckets are equal parts of the values; neither spikes nor gaps are lost. The last value is kept, too.
    """
    if len(values) <= 2 * buckets:
        return np.arange(len(values))
    kept, is_finite = [len(values) - 1], np.isfinite(values)
    for start, end in pairwise(np.arange(buckets + 1) * len(values) // buckets):
        finite, broken = (start + np.flatnonzero(part) for part in (is_finite[start:end], ~is_finite[start:end]))
        kept += [start, *broken[:1]]
        if len(finite):
            kept += [finite[values[finite].argmin()], finite[values[finite].argmax()]]
    return np.unique(kept)


def moving_mean(curve: Curve) -> tuple[Curve, int]:
    """Returns the means of the finite values around evenly spaced steps, and how many values a mean covers.

    At the ends a mean covers fewer; at the start as many on the left as on the right, because the slope is steep there.
    """
    count = len(curve.values)
    half = max(2, count // _MEAN_SHARE)
    centers, means = _evenly(count, _MEAN_POINTS), []
    for center in centers:
        left = min(half, center)
        part = curve.values[center - left : center + (half if left == half else left) + 1]
        finite = part[np.isfinite(part)]
        means.append(finite.mean() if len(finite) else math.nan)
    return Curve(steps=curve.steps[centers], values=np.array(means)), 2 * half + 1


def _chart(
    runs: Sequence[RunCurves],
    title: str,
    labels: Mapping[str, str],
    *,
    unit: str = "",
    zero: bool = False,
    divisor: float = 1.0,
    mean: bool = False,
) -> Chart:
    """Makes a chart of the metrics in `labels` that the runs have; `mean` adds the moving mean of training metrics."""
    lines: list[Line] = []
    levels: dict[str, float] = {}
    for number, run in enumerate(runs):
        for order, (metric, label) in enumerate(labels.items()):
            if metric not in run.curves:
                continue
            levels |= _levels(run, metric)
            whole = run.curves[metric]
            curve = Curve(steps=whole.steps, values=whole.values / divisor)
            if len(runs) > 1:
                label = run.name if len(labels) == 1 else f"{run.name}, {label}"
            color, dash = (order, 0) if len(runs) == 1 else (number, order)  # of several runs, each has a color
            line = Line(label=label, run=number, color=color, dash=dash, style="plain", curve=curve)
            if metric.startswith("eval/"):
                lines.append(replace(line, style="dots"))
            elif mean and len(curve.values) >= _MEAN_MIN_VALUES:
                means, covered = moving_mean(curve)
                lines.append(replace(line, style="faint"))
                lines.append(replace(line, style="mean", label=f"{label}, mean of {covered:,} logged", curve=means))
            else:
                lines.append(line)
    is_metric = any(metric == "loss" or metric.startswith("eval/") for metric in labels)
    return Chart(title=title, unit=unit, zero=zero, is_metric=is_metric, lines=lines, levels=levels)


def _levels(run: RunCurves, metric: str) -> dict[str, float]:
    """Returns the baselines of a validation metric; for the loss also those in bits per byte, converted to nats.

    On the same text, bits per byte are the loss times a constant: the bytes of the average token.
    """
    if not metric.startswith("eval/"):
        return {}
    levels = dict(run.baselines.get(metric.removeprefix("eval/"), {}))
    if metric == "eval/loss" and "eval/bits_per_byte" in run.curves:
        nats = run.curves[metric].values[-1] / run.curves["eval/bits_per_byte"].values[-1]
        levels |= {name: value * nats for name, value in run.baselines.get("bits_per_byte", {}).items()}
    return {name: value for name, value in levels.items() if math.isfinite(value)}


def _is_constant(line: Line) -> bool:
    values = line.curve.values
    return bool(np.isfinite(values).all() and (values == values[0]).all())


def _constant_texts(chart: Chart) -> list[tuple[str, str]]:
    """Returns label and value of each line of a chart in which nothing changes; one if all are equal."""
    formatted = format_metric if chart.is_metric else format_number
    texts = {line.label: f"{formatted(float(line.curve.values[-1]))} {chart.unit}".rstrip() for line in chart.lines}
    if len({*texts.values()}) == 1:
        return [(chart.title, next(iter(texts.values())))]
    return [(f"{chart.title}: {label}", text) for label, text in texts.items()]


def _evenly(count: int, most: int) -> np.ndarray:
    """Returns at most `most` indices of `count` values, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)) if count else np.array([], int)


def _line_data(line: Line, buckets: int, is_metric: bool) -> dict[str, Any]:
    steps, values = _points(line.curve, downsample(line.curve.values, buckets), is_metric)
    style = {"label": line.label, "run": line.run, "color": line.color, "dash": line.dash, "style": line.style}
    return {**style, "steps": steps, "values": values}


def _points(curve: Curve, indices: np.ndarray, is_metric: bool = False) -> tuple[list[int], list[float | str]]:
    return curve.steps[indices].tolist(), [_json_number(value, is_metric) for value in curve.values[indices].tolist()]


def _json_number(value: float, is_metric: bool) -> float | str:
    if not math.isfinite(value):
        return str(value)
    return float(format_metric(value) if is_metric else f"{value:.6g}")
