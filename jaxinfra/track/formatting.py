"""Formats numbers and metrics for people, the same way in the console, the tables and the report."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_PERF_METRICS = (
    "step_time_s",
    "data_wait_s",
    "mfu",
    "slowest_process",
    "slowest_process_s",
    "slowest_process_excess_s",
    "slowest_devices",
    "slowest_devices_slowdown",
)
_HOST_METRICS = ("open_files", "threads")


def format_number(value: object) -> str:
    """Formats integers with thousands separators, floats with five significant digits, all else with `str`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def format_count(value: float) -> str:
    """Formats a number rounded to an integer, with thousands separators."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def format_short(value: float) -> str:
    """Formats a number with three significant digits and a suffix: "8.03 B" for 8,030,261,248, "124 M", "16.9 T"."""
    if not math.isfinite(value):
        return str(value)
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:,.{max(0, 2 - len(str(int(abs(scaled)))) + 1)}f} {suffix}"
    return f"{value:.4g}"


def format_metric(value: float) -> str:
    """Formats a loss, bits per byte or another metric of an evaluation: four decimals, or four digits below 0.1."""
    return f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.4g}"


def format_percent(fraction: float) -> str:
    """Formats a fraction of one as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%"


def bytes_unit(n_bytes: float) -> tuple[float, str]:
    """Returns the largest binary unit that is not larger than `n_bytes`: its size in bytes, and its name."""
    power = 0
    while abs(n_bytes) >= 1024.0 ** (power + 1) and power < len(_BYTE_UNITS) - 1:
        power += 1
    return 1024.0**power, _BYTE_UNITS[power]


def format_bytes(n_bytes: float) -> str:
    """Formats bytes in their `bytes_unit`."""
    if not math.isfinite(n_bytes):
        return str(n_bytes)
    divisor, unit = bytes_unit(n_bytes)
    return f"{n_bytes / divisor:.{2 if divisor > 1 else 0}f} {unit}"


def format_files(count: int) -> str:
    """Formats a number of files: "1 file", "1,200 files"."""
    return "1 file" if count == 1 else f"{count:,} files"


def format_counts(counts: Sequence[int | None]) -> str:
    """Formats counts in their order, such as "4, 3, 2 x 3": those that follow on equal ones as one; None is unknown."""
    runs = [(value, len([*group])) for value, group in itertools.groupby(counts)]
    return ", ".join(f"{'?' if value is None else value}{f' x {times}' * (times > 1)}" for value, times in runs)


def format_duration(seconds: float) -> str:
    """Formats seconds as m:ss, as h:mm:ss from one hour on, or as a dash if they are not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"


def format_step(seconds: float) -> str:
    """Formats the time of a step or of its parts: milliseconds below a second."""
    return f"{1e3 * seconds:,.1f} ms" if seconds < 1 else f"{seconds:,.3f} s"


def format_energy(joules: float | None, planned_joules: float | None) -> str:
    """Formats the energy of a run, beside that of its plan; nothing if it was not measured."""
    kwh, planned = (format_number((each or 0.0) / 3.6e6) for each in (joules, planned_joules))
    beside = "" if planned_joules is None else f", planned {planned} kWh for its steps"
    return "" if joules is None else f"energy of the devices {kwh} kWh{beside}"


def format_age(seconds: float) -> str:
    """Formats an age in its largest unit: "12 s", "5 min", "3 h", "2 d"."""
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def metric_label(name: str) -> str:
    """Returns a metric's name for people: "bits per byte" for `bits_per_byte`, "tokens/s" for `tokens_per_s`."""
    return name.replace("_per_s", "/s").replace("_", " ")


def shown_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns metrics as pages and tables show them: as `loss` the mean since the last logged step, `loss_mean`."""
    shown = dict(metrics)
    if "loss_mean" in shown:  # it is missing if all steps were skipped
        shown["loss"] = shown.pop("loss_mean")
    return shown


def grouped_name(metric: str) -> str:
    """Returns a metric's name with its group: "train/loss", "eval/loss", "perf/mfu", "memory/rss_bytes"."""
    if "/" in metric:
        return metric
    if metric.endswith("_bytes") or metric in _HOST_METRICS:
        return f"memory/{metric}"
    return f"perf/{metric}" if metric.endswith("_per_s") or metric in _PERF_METRICS else f"train/{metric}"


def statistics_markdown(statistics: Mapping[str, tuple[int | float | str, str]]) -> str:
    """Makes a Markdown table of the statistics of a run."""
    rows = [f"| {name} | {format_number(value)} | {how} |" for name, (value, how) in statistics.items()]
    return "\n".join(["| number | value | unit or formula |", "| --- | --- | --- |", *rows])


def summary_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Turns the summary of a run into (label, text) rows; values that are None are left out.

    `modality` ("token") is part of some keys (`tokens`, `tokens_per_s_median`). Each metric in `validation` is a row,
    followed by a row for each of its `baselines[metric]`. Keys without a label come last, unchanged.
    """
    units = f"{values.get('modality', 'unit')}s"
    labels: dict[str, tuple[str, Callable[[Any], str]]] = {
        "status": ("Status", str),
        "steps": ("Steps", format_number),
        units: (units.capitalize(), format_number),
        "wall_s": ("Wall time", format_duration),
        "final_loss": ("Final training loss", format_metric),
        "validation": ("Validation", format_metric),
        f"{units}_per_s_median": (f"{units.capitalize()}/s, median", format_count),
        "mfu_median": ("MFU, median", format_percent),
        "peak_rss_bytes": ("Peak host memory", format_bytes),
        "peak_flops_per_device": ("Peak FLOP/s per device", format_number),
        "peak_source": ("  source", str),
        "checkpoint": ("Checkpoint", str),
        "report": ("Report", str),
    }
    baselines = values.get("baselines") or {}
    rows: list[tuple[str, str]] = []
    for key, (label, formatter) in labels.items():
        value = values.get(key)
        if key == "validation":
            for name, own in (value or {}).items():
                metric, others = metric_label(name), baselines.get(name, {})
                rows.append((f"Validation {metric}", format_metric(own)))
                rows += [(f"  {baseline}, {metric}", format_metric(other)) for baseline, other in others.items()]
        elif value is not None:
            rows.append((label, formatter(value)))
    known = {*labels, "modality", "baselines"}
    rows += [(key, format_number(value)) for key, value in values.items() if key not in known and value is not None]
    return rows


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into `{"a.b": leaf}`, in order; an empty mapping has no leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
