"""Lists the runs of a folder with their state, progress and results. Imports no JAX."""

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from jaxinfra.config import read_record
from jaxinfra.config.source import RECORD_FILE, runs_of_config
from jaxinfra.config.view import config_leaves
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.storage.atomic import read_file
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.files import list_folders
from jaxinfra.storage.json_lines import parse_json
from jaxinfra.storage.lease import current_owner
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.mirror import fetch
from jaxinfra.track.formatting import shown_metrics
from jaxinfra.track.goodput import GOODPUT_FILE, account, read_ledger
from jaxinfra.track.jsonl import METRICS_FILE, SAMPLES_FILE, SKIPPED_FILE, SUMMARY_FILE, metrics_row, read_summary

RUN_FILES = (
    RECORD_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    SKIPPED_FILE,
    SUMMARY_FILE,
    GOODPUT_FILE,
    "wandb.json",
    "mlflow.json",
)
"""The files that a resumed run goes on with; event files of TensorBoard are new ones at each start."""
_STEPS = "checkpoints/[0-9]*"
_NOT_COMPARED = ("name", "root", "track", "profile", "watchdog")  # say where a run writes, not what it trains


@dataclass(frozen=True, kw_only=True)
class RunOverview:
    """One run of a folder."""

    path: str  # directory or URL of the run
    state: str  # "running", "finished", "stopped", "failed", "interrupted" (was killed), or what is wrong
    completed_steps: int = 0  # number of steps up to the last logged one
    total_steps: int | None = None  # `train.steps` of its config
    loss: float | None = None  # training loss, the mean of the steps since a logged one, in nats
    best_validation: float | None = None  # smallest validation loss, in nats
    last_validation: float | None = None  # the last one
    units_per_s: float | None = None  # throughput at the last logged step, in tokens or images
    goodput: float | None = None  # time of steps that were not lost, as a fraction of all since the first start
    age_s: float = 0.0  # since the last change of its metrics or record, in a bucket since its last start
    source: str = ""  # the config file or record that it was started with
    fingerprint: str = ""  # of the config
    config: Mapping[str, str] = field(default_factory=dict)  # the text of each field by its path


def list_runs(root: str | Path) -> list[RunOverview]:
    """Returns the runs below a folder, or directly below a URL, newest first; a damaged run has its problem as state.

    Raises ConfigError if there is no such folder, StorageError if it cannot be read.
    """
    if is_remote(root):
        runs, url = list[RunOverview](), str(root).rstrip("/")
        for location in (f"{url}/{name}" for name in list_folders(url)):
            with local_files(location) as folder:
                if (folder / RECORD_FILE).exists():
                    runs.append(run_overview(folder, location))
        return sorted(runs, key=lambda run: run.age_s)
    if not Path(root).is_dir():
        raise ConfigError(f"{root}: no such folder; name the folder that holds runs, such as runs")
    folders = {record.parent for record in Path(root).glob(f"**/{RECORD_FILE}")}
    folders |= {step.parent.parent for step in Path(root).glob(f"**/{_STEPS}")}
    return sorted((run_overview(folder, str(folder)) for folder in folders), key=lambda run: run.age_s)


def differences(runs: Sequence[RunOverview]) -> list[str]:
    """Returns what differs in each run from the others of its config file: "peak_lr=0.003 train.steps=60".

    A field is shown if the runs that have it have different values, but not in those that have the most common value.
    """
    counts = defaultdict[tuple[str, str], Counter[str]](Counter)  # of values, by config file and field
    for run in runs:
        for path, text in run.config.items():
            counts[run.source, path][text] += 1

    def differs(run: RunOverview, path: str) -> bool:
        (usual, count), *others = counts[run.source, path].most_common(2)
        is_usual = not others or (run.config[path] == usual and count > others[0][1])
        return not is_usual and path.partition(".")[0] not in _NOT_COMPARED

    return [
        " ".join(f"{_short_name(path, run.config)}={text}" for path, text in run.config.items() if differs(run, path))
        for run in runs
    ]


def _short_name(path: str, paths: Iterable[str]) -> str:
    """Returns the shortest end of a path that no other path has, and that does not begin with an index."""
    parts = path.split(".")
    ends = (".".join(parts[start:]) for start in reversed(range(len(parts))) if not parts[start].isdigit())
    return next((end for end in ends if sum(f".{each}".endswith(f".{end}") for each in paths) == 1), path)


@contextmanager
def local_files(location: str, names: Sequence[str] = RUN_FILES) -> Iterator[Path]:
    """Yields a folder with the small files of a run; it is a temporary copy of those in a bucket with these names."""
    if not is_remote(location):
        yield Path(location)
        return
    with TemporaryDirectory(prefix="jaxinfra-run-") as folder:
        fetch(location, names, Path(folder))
        yield Path(folder)


def run_overview(folder: Path, location: str) -> RunOverview:
    """Reads the files of one run, which are in `folder`."""
    try:
        record = read_record(record_of(str(folder)))
        summary = read_summary(folder / SUMMARY_FILE) if (folder / SUMMARY_FILE).exists() else {}
        last, validations = _read_metrics(folder / METRICS_FILE)
        age_s = _age_s(record) if is_remote(location) else _file_age_s(folder)
        completed = max(int(last.get("step", 0)), summary.get("steps") or 0)
        state = _state(location, summary, completed)
        goodput = account(read_ledger(folder / GOODPUT_FILE)).fraction
    except JaxinfraError as error:
        return RunOverview(path=location, state=f"damaged: {error}", age_s=_file_age_s(folder))
    return RunOverview(
        path=location,
        state=state,
        completed_steps=completed,
        total_steps=record.get("config", {}).get("train", {}).get("steps"),
        loss=summary.get("final_loss", shown_metrics(last).get("loss")),  # a stop may be between two logged steps
        best_validation=min(validations, default=None),
        last_validation=validations[-1] if validations else None,
        units_per_s=next((value for name, value in last.items() if name.endswith("s_per_s")), None),
        goodput=None if math.isnan(goodput) else goodput,
        age_s=age_s,
        source=os.path.normpath(str(record.get("source", location))),
        fingerprint=str(record.get("fingerprint", "")),
        config=config_leaves(record["config"]),
    )


def _file_age_s(folder: Path) -> float:
    files = [folder / name for name in (RECORD_FILE, METRICS_FILE) if (folder / name).exists()] or [folder]
    return time.time() - max(file.stat().st_mtime for file in files)


def _age_s(record: Mapping[str, Any]) -> float:
    """Returns the seconds since the last start of a run in a bucket; 0 if its record does not tell."""
    try:
        return time.time() - datetime.fromisoformat(str(record["created"])).timestamp()
    except (KeyError, ValueError):
        return 0.0


def record_of(location: str) -> str:
    """Returns the path or URL of a run's record; raises ConfigError if a folder has none."""
    if not (is_remote(location) or Path(location, RECORD_FILE).exists()):
        raise no_run_error(location)
    return f"{location.rstrip('/')}/{RECORD_FILE}"


def parse_source(source: str | Path) -> tuple[str, int | None]:
    """Splits `runs/base@500` into directory and step; `runs/base` has the step None."""
    source = os.path.expanduser(source)
    path, at, step = source.rpartition("@")
    has_step = at and step.isascii() and step.isdecimal()  # else the "@" is part of the path
    return (path, int(step)) if has_step else (source, None)


def no_run_error(path: str | Path) -> ConfigError:
    """Returns the error for a directory without a run record; it names the newest run with a similar name."""
    if not is_remote(path) and any(Path(path).glob(_STEPS)):
        fix = "it has checkpoints: start the command of the run again, which writes it anew"
        return ConfigError(f"{path}: no {RECORD_FILE} there; {fix}")
    if not is_remote(path) and any(Path(path, name).exists() for name in ("config.json", "adapter_config.json")):
        return ConfigError(f"{path}: is no run, but a published model or adapter; use hf:{path}")
    if not is_remote(path) and Path(path, "sweep.json").exists():
        found = sorted(each.parent.name for each in Path(path).glob(f"*/{RECORD_FILE}"))
        fix = f"name one of them, such as {Path(path, found[0])}" if found else "it has none yet"
        return ConfigError(f"{path}: is a sweep of several runs; {fix}")
    run, step = parse_source(path)
    if step is not None and not is_remote(path) and Path(run, RECORD_FILE).exists():
        return ConfigError(f"{path}: names a checkpoint, this is of a whole run; use {run}")
    similar = [] if is_remote(path) else runs_of_config(Path(path))
    fix = f"did you mean {similar[0]}?" if similar else "name the directory of a run, such as runs/quickstart"
    return ConfigError(f"{path}: no {RECORD_FILE} there; {fix}")


def _state(location: str, summary: Mapping[str, Any], completed_steps: int) -> str:
    if current_owner(location) is not None:
        return "running"
    # A summary of fewer steps is that of an earlier stop.
    is_current = summary.get("steps", completed_steps) == completed_steps
    return summary.get("status", "interrupted") if is_current else "interrupted"


def _read_metrics(path: Path) -> tuple[dict[str, float], list[float]]:
    """Returns the last row of a training step, {} without one, and the validation losses; parses no other rows."""
    with storage_errors(path, action="read"):
        lines = read_file(path).split(b"\n") if path.exists() else []
    evaluated = [metrics_row(parse_json(line)) for line in lines if b'"eval/loss"' in line]
    training = (metrics_row(parse_json(line)) for line in reversed(lines) if b'"loss"' in line)
    return next(filter(None, training), {}), [row["eval/loss"] for row in evaluated if row and "eval/loss" in row]
