"""Compares what the steps of a run take with its plan, and says which part is off. Imports no JAX.

A plan is a file of `plan CONFIG --on TOPOLOGY --json FILE`, for chips, or of `plan --fit RUN --json FILE`, measured on
a run that nothing disturbed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.storage.json_lines import read_json_lines
from jaxinfra.track.formatting import format_bytes, format_percent, format_step
from jaxinfra.track.goodput import GOODPUT_FILE, ledger_row
from jaxinfra.track.jsonl import METRICS_FILE, read_metrics

CHECKED_STEPS = 100
"""Steps of a start after which a run looks at its plan."""
_WARM_STEPS = 5  # of a start, which compile and fill caches
_TOLERANCE = 0.15  # of the planned time of a step
_MEMORY_TOLERANCE = 0.1


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a step takes, in seconds on average; None is not known.

    Attributes:
        estimate_s: all of it, without saves.
        device_s: of it the devices compute, and wait for one another.
        host_s: of it the host needs beside them.
        data_s: of it the loop waits for batches.
        save_s: for which a save stalls the loop.
        slow_process_s: for which the devices wait for the slowest process.
        slowest: the number of that process.
        compiles: programs that are compiled in each step.
        memory_bytes: of a device, or of the first process where devices do not tell.
        saves_per_step: saves that are begun in a step.
    """

    estimate_s: float
    device_s: float | None = None
    host_s: float | None = None
    data_s: float = 0.0
    save_s: float | None = None
    slow_process_s: float = 0.0
    slowest: int | None = None
    compiles: float = 0.0
    memory_bytes: float | None = None
    saves_per_step: float = 0.0


def measure(folder: Path) -> Terms | None:
    """Returns what the steps of the last start take; None before it has made enough of them.

    `folder` has the ledger and the metrics of the run.
    """
    path = folder / GOODPUT_FILE
    rows = list(read_json_lines(path, ledger_row)) if path.exists() else []
    rows = [row for row in rows if row["attempt"] == rows[-1]["attempt"] and row["from"] is not None]
    warm = [row for row in rows if row["step"] >= row["from"] + _WARM_STEPS and row["phase"] != "end"]
    if not warm or warm[-1]["step"] <= warm[0]["step"]:
        return None
    first, last = warm[0], warm[-1]
    steps = last["step"] - first["step"]

    def spent(phase: str) -> float:
        return last["seconds"].get(phase, 0.0) - first["seconds"].get(phase, 0.0)

    logged = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    logged = [row for row in logged if first["step"] <= row["step"] <= last["step"]]
    saves = last["saves"] - first["saves"]
    slow = [row for row in logged if "slowest_process" in row]
    return Terms(
        estimate_s=sum(map(spent, ("step", "device", "data"))) / steps,
        device_s=spent("device") / steps,
        host_s=spent("step") / steps,
        data_s=spent("data") / steps,
        save_s=spent("save") / saves if saves else None,
        slow_process_s=_median([row["slowest_process_s"] for row in slow]),
        slowest=int(_median([row["slowest_process"] for row in slow])) if slow else None,
        compiles=(last.get("compiles", 0) - first.get("compiles", 0)) / steps,
        memory_bytes=max((row.get("device_peak_bytes", row.get("rss_bytes", 0.0)) for row in logged), default=None),
        saves_per_step=saves / steps,
    )


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def read_plan(path: str) -> Terms:
    """Reads the plan of one topology; raises ConfigError if there is none in the file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file of plan --json") from None
    except ValueError:
        rows = None
    row = rows[0] if isinstance(rows, list) and len(rows) == 1 else None
    if not isinstance(row, dict) or not isinstance(row.get("estimate_s"), float):
        fix = f"write it by plan CONFIG --on TOPOLOGY --json {path}"
        raise ConfigError(f"{path}: has not the plan of one topology; {fix}")
    return Terms(**{name: row[name] for name in Terms.__dataclass_fields__ if name in row})


def values(terms: Terms, source: str) -> list[dict[str, Any]]:
    """Returns the contents of a plan that was measured on a run."""
    return [{"measured_on": source, **asdict(terms)}]


def verdict(found: Terms, plan: Terms) -> str:
    """Returns one line: that a run is as planned, or which part is off, and by how much."""
    excess = _excess(found, plan)
    per_step_s, planned_s = (each.estimate_s + (each.save_s or 0.0) * found.saves_per_step for each in (found, plan))
    if plan.save_s is None:
        per_step_s = found.estimate_s
    both = f"a step takes {format_step(per_step_s)}, planned {format_step(planned_s)}"
    too_much = (found.memory_bytes or 0.0) - (plan.memory_bytes or float("inf"))
    memory = ""
    if plan.memory_bytes and too_much > _MEMORY_TOLERANCE * plan.memory_bytes:
        memory = f"; memory is off: {format_bytes(found.memory_bytes or 0)}, planned {format_bytes(plan.memory_bytes)}"
    cause, seconds = max(excess.items(), key=lambda each: each[1])
    if seconds < _TOLERANCE * planned_s:
        if memory:
            return f"{both}{memory}"
        return f"as planned: {both}"
    return f"{both}: {cause} {format_step(seconds)} more ({format_percent(seconds / planned_s)}){memory}"


def _excess(found: Terms, plan: Terms) -> Mapping[str, float]:
    """Returns what each part of a step takes beyond the plan, in seconds."""
    total_s = found.estimate_s - plan.estimate_s
    saves_s = 0.0 if plan.save_s is None else ((found.save_s or 0.0) - plan.save_s) * found.saves_per_step
    excess = {"waiting for data takes": found.data_s - plan.data_s, "saves stall it": saves_s}
    if found.compiles > plan.compiles + 0.5:
        return {**excess, f"{found.compiles:.0f} programs are compiled in each: that takes": total_s}
    slow_s = found.slow_process_s - plan.slow_process_s
    rest_s = total_s - excess["waiting for data takes"]
    if found.slowest is not None and slow_s > rest_s / 2:
        return {**excess, f"process {found.slowest} is slow, all wait for it": rest_s}
    if plan.host_s is None or found.host_s is None or plan.device_s is None or found.device_s is None:
        return {**excess, "the devices take": rest_s}
    devices = "the devices take" if found.slowest is None else "the devices, or the links between processes, take"
    return {
        **excess,
        devices: found.device_s - plan.device_s,
        "the host takes": found.host_s - plan.host_s,
    }
