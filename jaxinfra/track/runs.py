"""Lists the runs of a folder with their state, progress and results. Imports no JAX."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxinfra.config import read_record
from jaxinfra.config.source import RECORD_FILE, similar_run
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.storage.lock import is_locked
from jaxinfra.track.jsonl import METRICS_FILE, SUMMARY_FILE, read_json_object


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """One run of a folder.

    Attributes:
        path: directory of the run.
        state: "running", "finished", "stopped" (asked to stop, and saved), "failed" (an error ended it), "interrupted"
            (it was killed), or what is wrong with its files.
        completed_steps: number of steps up to the last logged one.
        total_steps: `train.steps` of its config.
        loss: training loss at the last logged step, in nats, or None.
        best_validation: smallest validation loss, in nats, or None.
        units_per_s: throughput at the last logged step, in tokens or images, or None.
        age_s: seconds since the last change of its metrics or record.
    """

    path: Path
    state: str
    completed_steps: int = 0
    total_steps: int | None = None
    loss: float | None = None
    best_validation: float | None = None
    units_per_s: float | None = None
    age_s: float = 0.0


def list_runs(root: Path) -> list[RunOverview]:
    """Returns the runs below `root`, newest first; a damaged run is listed with its problem."""
    folders = [record.parent for record in root.glob(f"**/{RECORD_FILE}")]
    return sorted(map(run_overview, folders), key=lambda run: run.age_s)


def run_overview(path: Path) -> RunOverview:
    """Reads the files of one run."""
    files = [path / name for name in (RECORD_FILE, METRICS_FILE) if (path / name).exists()]
    age_s = time.time() - max(file.stat().st_mtime for file in files)
    try:
        record = read_record(path / RECORD_FILE)
        summary = read_json_object(path / SUMMARY_FILE) if (path / SUMMARY_FILE).exists() else {}
    except JaxinfraError as error:
        return RunOverview(path=path, state=f"damaged: {error}", age_s=age_s)
    last, validations = _read_metrics(path / METRICS_FILE)
    completed = max(int(last.get("step", 0)), summary.get("steps", 0))
    return RunOverview(
        path=path,
        state=_state(path, summary, completed),
        completed_steps=completed,
        total_steps=record.get("config", {}).get("train", {}).get("steps"),
        loss=last.get("loss_mean", last.get("loss")),
        best_validation=min(validations, default=None),
        units_per_s=next((value for name, value in last.items() if name.endswith("s_per_s")), None),
        age_s=age_s,
    )


def no_run_error(path: Path) -> ConfigError:
    """Returns the error for a directory without a run record; it names the newest run with a similar name."""
    similar = similar_run(path)
    fix = f"did you mean {similar}?" if similar else "name the directory of a run, such as runs/quickstart"
    return ConfigError(f"{path}: no {RECORD_FILE} there; {fix}")


def _state(path: Path, summary: Mapping[str, Any], completed_steps: int) -> str:
    if is_locked(path):
        return "running"
    # A summary of fewer steps is that of an earlier stop.
    is_current = summary.get("steps", completed_steps) == completed_steps
    return summary.get("status", "interrupted") if is_current else "interrupted"


def _read_metrics(path: Path) -> tuple[dict[str, Any], list[float]]:
    """Returns the last row of a training step, {} without one, and the validation losses; parses no other rows."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    losses = [row["eval/loss"] for line in lines if b'"eval/loss"' in line and isinstance((row := _row(line)), dict)]
    training = (_row(line) for line in reversed(lines) if b'"loss"' in line)
    return next((row for row in training if row), {}), [loss for loss in losses if isinstance(loss, float)]


def _row(line: bytes) -> dict[str, Any]:
    """Parses a line; a kill may have torn the last one, which is {} then."""
    try:
        return json.loads(line)
    except ValueError:
        return {}
