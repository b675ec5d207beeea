"""How numbers are written for people, the same in the console, the tables and the report.

Not for files that programs read: those hold the full value. Every function returns one line.
"""

import math
from collections.abc import Mapping
from typing import Any

_SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_number(value: object) -> str:
    """Writes integers with thousands separators, floats with five significant digits, all else as it is."""
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
    """Writes a count, whole or fractional, as a whole number with thousands separators."""
    return f"{value:,.0f}" if math.isfinite(value) else str(value)


def format_percent(fraction: float) -> str:
    """Writes a fraction of one as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%"


def bytes_unit(n_bytes: float) -> tuple[float, str]:
    """Returns the largest binary unit that keeps a number of bytes at one or more, and its name."""
    power = 0
    while abs(n_bytes) >= 1024.0 ** (power + 1) and power < len(_SIZE_UNITS) - 1:
        power += 1
    return 1024.0**power, _SIZE_UNITS[power]


def format_bytes(n_bytes: float) -> str:
    """Writes a number of bytes in its `bytes_unit`."""
    if not math.isfinite(n_bytes):
        return str(n_bytes)
    divisor, unit = bytes_unit(n_bytes)
    return f"{n_bytes / divisor:.{2 if divisor > 1 else 0}f} {unit}"


def format_duration(seconds: float) -> str:
    """Writes seconds as m:ss, or h:mm:ss from one hour on; a dash when the time is not known."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"


_SUMMARY = {
    "status": ("Status", str),
    "steps": ("Steps", format_number),
    "units": ("Units", format_number),
    "wall_s": ("Wall time", format_duration),
    "final_loss": ("Final training loss", "{:.4f}".format),
    "validation": ("Validation", "{:.4f}".format),
    "units_per_s_median": ("Units/s, median", format_count),
    "mfu_median": ("MFU, median", format_percent),
    "peak_rss_bytes": ("Peak host memory", format_bytes),
    "peak_flops_per_device": ("Peak FLOP/s a device", format_number),
    "peak_source": ("  where it is from", str),
    "checkpoint": ("Checkpoint", str),
    "report": ("Report", str),
}


def metric_label(name: str) -> str:
    """Writes the name of a metric: `bits_per_byte` is "bits per byte", `tokens_per_s` is "tokens/s"."""
    return name.replace("_per_s", "/s").replace("_", " ")


def summary_rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Turns the summary of a run into (label, text) rows.

    Known values come first in a fixed order; values that are None are left out. `modality` ("token") names the counts
    (`tokens`, `tokens_per_s_median`). Each score of `validation` is a row, followed by its `baselines` (by score, then
    by name). Unknown values follow under their names.
    """
    rows: list[tuple[str, str]] = []
    units, known = f"{values.get('modality', 'unit')}s", {"modality", "baselines"}
    baselines = values.get("baselines") or {}
    for generic, (label, written) in _SUMMARY.items():
        key = generic.replace("units", units)
        known.add(key)
        value = values.get(key)
        if key == "validation":
            for name, score in (value or {}).items():
                rows.append((f"Validation {metric_label(name)}", written(score)))
                rows += [
                    (f"  {of}, {metric_label(name)}", written(other)) for of, other in baselines.get(name, {}).items()
                ]
        elif value is not None:
            rows.append((label.replace("Units", units.capitalize()), written(value)))
    others = {key: value for key, value in values.items() if key not in known and value is not None}
    return rows + [(key, format_number(value)) for key, value in others.items()]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings into `{"a.b": leaf}`, in order; an empty mapping has no leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves
