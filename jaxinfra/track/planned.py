"""Compares what the steps of a run take with its plan, and says which part is off. Imports no JAX.

A plan is a file of `plan CONFIG --on TOPOLOGY --json FILE`, for chips, or of `plan --fit RUN --json FILE`, measured on
a run that nothing disturbed.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median, median_low, mode
from typing import Any

from jaxinfra.config import read_record
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.machine.chips import chip_name
from jaxinfra.storage import outputs
from jaxinfra.storage.json_lines import is_number, read_json_lines
from jaxinfra.track.formatting import format_bytes, format_number, format_percent, format_step
from jaxinfra.track.goodput import GOODPUT_FILE, ledger_row
from jaxinfra.track.jsonl import METRICS_FILE, read_metrics

CHECKED_STEPS = 100
"""Steps of a start after which a run looks at its plan."""
WARM_STEPS = 5
"""The first steps of a start, which compile and fill caches, do not count."""
SLOW_DEVICES = 1.3
"""Devices are slow if they take this many times as long for the same as the others' median."""
_TOLERANCE = 0.15  # of the planned time of a step
_MEMORY_TOLERANCE = 0.1
_STEP_PHASES = ("step", "device", "data", "compile")


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The mean time of a step and of its parts, in seconds. None means that it is not known.

    Attributes:
        source: the run or the plan that these are of, for people.
        estimate_s: all of it, without saves.
        device_s: of it the loop waits for the devices, which compute and exchange data.
        host_s: of it the loop itself takes.
        data_s: of it the loop waits for batches.
        save_s: for which a save stalls the loop.
        slow_process_s: for which the devices wait for the slowest process longer than for the others.
        slowest: the number of that process.
        device_slowdown: how many times as long as those of the others the slowest devices of a process take.
        slowest_devices: the number of that process.
        compiles: programs that are compiled in each step.
        joules: that all devices use in a step, with the pauses between steps.
        memory_bytes: of a device, or of the first process where devices do not tell.
        is_device_memory: whether it is of a device.
        saves_per_step: saves, of copies too, that are begun in a step.
        devices: how many there are.
        device_kind: their kind, by JAX, or how it begins.
    """

    source: str = ""
    estimate_s: float
    device_s: float | None = None
    host_s: float | None = None
    data_s: float = 0.0
    save_s: float | None = None
    slow_process_s: float = 0.0
    slowest: int | None = None
    device_slowdown: float = 1.0
    slowest_devices: int | None = None
    compiles: float = 0.0
    joules: float | None = None
    memory_bytes: float | None = None
    is_device_memory: bool = True
    saves_per_step: float = 0.0
    devices: int | None = None
    device_kind: str = ""


_FIELDS = frozenset(each.name for each in fields(Terms))


def measure(folder: Path) -> Terms | None:
    """Returns what the steps of the last start take; None before it has made enough of them.

    `folder` has the ledger and the metrics of the run.
    """
    path = folder / GOODPUT_FILE
    rows = list(read_json_lines(path, ledger_row)) if path.exists() else []
    # Of the last start, and since it last went back to a checkpoint.
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in ("attempt", "resumes"))]
    rows = [row for row in rows if row["from"] is not None and row["phase"] != "end"]
    warm = [row for row in rows if row["step"] >= row["from"] + WARM_STEPS]
    if not warm or warm[-1]["step"] <= warm[0]["step"]:
        return None
    first, last = warm[0], warm[-1]
    steps = last["step"] - first["step"]

    def spent(phase: str) -> float:
        return last["seconds"].get(phase, 0.0) - first["seconds"].get(phase, 0.0)

    logged = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else []
    logged = [row for row in logged if first["step"] <= row["step"] <= last["step"]]
    saves = last["saves"] - first["saves"]
    slow = [row for row in logged if "slowest_process_excess_s" in row]
    slowest_devices, slowdown = slow_devices(logged)
    # Of steps alone: a save or an evaluation compiles when it is first run.
    compiles = sum(
        two.get("compiles", 0) - one.get("compiles", 0)
        for one, two in itertools.pairwise(warm)
        if two["step"] > one["step"] or _pauses_s(two) == _pauses_s(one)
    )
    hardware = read_record(folder / RECORD_FILE).get("devices") if (folder / RECORD_FILE).exists() else None
    hardware = hardware if isinstance(hardware, dict) else {}
    peaks = [row["device_peak_bytes"] for row in logged if "device_peak_bytes" in row]
    return Terms(
        estimate_s=sum(map(spent, ("step", "device", "data"))) / steps,
        device_s=spent("device") / steps,
        host_s=spent("step") / steps,
        data_s=spent("data") / steps,
        save_s=spent("save") / saves if saves else None,
        slow_process_s=median(row["slowest_process_excess_s"] for row in slow) if slow else 0.0,
        slowest=int(mode(row["slowest_process"] for row in slow)) if slow else None,
        device_slowdown=slowdown,
        slowest_devices=slowest_devices,
        compiles=compiles / steps,
        joules=None if "joules" not in first else (last["joules"] - first["joules"]) / steps,
        memory_bytes=max(peaks or (row["rss_bytes"] for row in logged if "rss_bytes" in row), default=None),
        is_device_memory=bool(peaks),
        saves_per_step=saves / steps,
        devices=hardware.get("count"),
        device_kind=hardware.get("kind", ""),
    )


def slow_devices(rows: Sequence[Mapping[str, float]]) -> tuple[int | None, float]:
    """Returns the process whose devices are the slowest in most measurements, and how many times as long they take.

    That is so in half of the measurements at least: a single one may be noise.
    """
    found = [(row["slowest_devices"], row["slowest_devices_slowdown"]) for row in rows if "slowest_devices" in row]
    found = [measurement for measurement, _ in itertools.groupby(found)]  # a row repeats the last one
    if len(found) < 2:
        return None, 1.0
    slowest = mode(process for process, _ in found)
    return int(slowest), median_low(slowdown if process == slowest else 1.0 for process, slowdown in found)


def _pauses_s(row: Mapping[str, Any]) -> float:
    """Returns the seconds that a start has spent on all but steps."""
    return sum(seconds for phase, seconds in row["seconds"].items() if phase not in _STEP_PHASES)


def read_plan(path: str) -> Terms:
    """Reads the plan of one topology, from a file or URL; raises ConfigError if there is none in it."""
    try:
        rows = json.loads(outputs.read_written(path))
    except JaxinfraError as error:
        what, _, _ = str(error).partition("; ")
        raise ConfigError(f"{what}; name a file of plan --json") from None
    except ValueError:
        rows = None
    row = rows[0] if isinstance(rows, list) and len(rows) == 1 else None
    if not isinstance(row, dict) or not _is_plan(row):
        fix = "name a file that plan CONFIG --on TOPOLOGY --json FILE has written"
        has = f"has {len(rows)} plans, not one" if isinstance(rows, list) and len(rows) > 1 else "has no plan"
        raise ConfigError(f"{path}: {has} of one topology; {fix}")
    values: dict[str, Any] = {name: row[name] for name in _FIELDS if name in row}
    values.setdefault("source", f"{row.get('name')} on {row['topology']}" if "topology" in row else path)
    return Terms(**values)


def _is_plan(row: Mapping[str, Any]) -> bool:
    """Whether the values of a row have the types of `Terms`, and a step takes time."""
    names = _FIELDS - {"source", "is_device_memory", "device_kind"}
    numbers = [value for name in names if (value := row.get(name)) is not None]
    if not all(map(is_number, [*numbers, row.get("estimate_s")])) or row["estimate_s"] <= 0:
        return False
    return isinstance(row.get("device_kind", ""), str)


def plan_rows(terms: Terms, source: str) -> list[dict[str, Any]]:
    """Returns the contents of a plan that was measured on a run."""
    return [asdict(replace(terms, source=source))]


def verdict(found: Terms, plan: Terms) -> str:
    """Returns one line: that a run is as planned, or which part is off most, and by how much."""
    if _is_elsewhere(found, plan):
        planned, is_of = (f"{each.devices} {each.device_kind}" for each in (plan, found))
        return f"not comparable: the plan ({plan.source}) is of {planned}, this run of {is_of} devices"
    takes_s, planned_s = found.estimate_s, plan.estimate_s
    if plan.save_s is not None:
        takes_s += (found.save_s or 0.0) * found.saves_per_step
        planned_s += plan.save_s * found.saves_per_step
    saves = " with its part of the saves" if plan.save_s is not None and found.saves_per_step else ""
    both = f"a step takes {format_step(takes_s)}{saves}, planned {format_step(planned_s)} ({plan.source})"
    if found.joules is not None and plan.joules is not None:
        both += f", with {format_number(found.joules)} J, planned {format_number(plan.joules)} J"
    memory = ""
    if _needs_more(found, plan):
        needed, planned = (format_bytes(each.memory_bytes or 0.0) for each in (found, plan))
        memory = f"; memory is off: {needed}, planned {planned}"
    cause, seconds = max(_excess(found, plan).items(), key=lambda each: each[1])
    if max(seconds, takes_s - planned_s) >= _TOLERANCE * planned_s:
        return f"{both}: {cause} {format_step(seconds)} more ({format_percent(seconds / planned_s)}){memory}"
    return f"{both}{memory}" if memory else f"as planned: {both}"


def _is_elsewhere(found: Terms, plan: Terms) -> bool:
    """Whether a plan is of other hardware, or of more or fewer devices."""
    if found.devices is None or plan.devices is None:
        return False
    return found.devices != plan.devices or chip_name(found.device_kind) != chip_name(plan.device_kind)


def _needs_more(found: Terms, plan: Terms) -> bool:
    """Whether a run needs more memory than planned, of the same kind."""
    if not plan.memory_bytes or not found.memory_bytes or plan.is_device_memory != found.is_device_memory:
        return False
    return found.memory_bytes > (1 + _MEMORY_TOLERANCE) * plan.memory_bytes


def _excess(found: Terms, plan: Terms) -> Mapping[str, float]:
    """Returns what each part of a step takes beyond the plan, in seconds."""
    total_s, data_s = found.estimate_s - plan.estimate_s, found.data_s - plan.data_s
    saves_s = 0.0 if plan.save_s is None else ((found.save_s or 0.0) - plan.save_s) * found.saves_per_step
    excess = {"waiting for data takes": data_s, "saves stall it": saves_s}
    if found.compiles > plan.compiles + 0.5:
        programs = "1 program is" if round(found.compiles) == 1 else f"{found.compiles:.0f} programs are"
        return {**excess, f"{programs} compiled in each: that takes": total_s - data_s}
    slow_s = found.slow_process_s - plan.slow_process_s
    if found.slowest is not None and slow_s > (total_s - data_s) / 2 > 0:
        return {**excess, f"process {found.slowest} is slow, all wait for it": total_s - data_s}
    # A plan for chips has the time of the devices alone.
    devices_s, host_s = plan.device_s or plan.estimate_s, plan.host_s or 0.0
    slowdown = found.device_slowdown - plan.device_slowdown
    is_slow = found.device_slowdown > SLOW_DEVICES * plan.device_slowdown
    if is_slow and slowdown * devices_s > (total_s - data_s) / 3 > 0:  # a step has more than matmuls
        return {**excess, f"the devices of process {found.slowest_devices} compute slowly, all wait": total_s - data_s}
    devices = "the devices take" if found.slowest is None else "the devices, or the links between processes, take"
    return {
        **excess,
        devices: (found.device_s or 0.0) - devices_s,
        "the host takes": (found.host_s or 0.0) - host_s,
    }
