"""metrics.jsonl and summary.json: the metrics of a run, for other programs to read.

samples.jsonl has a line `{"step": 12, "text": "..."}` for each text that the model wrote, if the run asks for some.
summary.json has the final values, or the error that ended the run. While a run goes on, or after a kill, there is none.

Each line of metrics.jsonl is a JSON object `{"step": 12, "time_s": 3.5, "loss": 2.1, ...}`. `time_s` is the training
time so far, without the pauses between a stop and a resume. JSON has no NaN or infinity: they are the strings "nan",
"inf" and "-inf", which `read_metrics` turns back into floats. `step` is the number of completed
steps. A run that resumes at step s drops the lines after s, and those that are damaged.
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from jaxinfra.errors import HungError, JaxinfraError, PeerLostError, StorageError
from jaxinfra.failpoints import failpoint
from jaxinfra.storage.appender import Appender
from jaxinfra.storage.atomic import read_file, write_bytes_atomic
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.json_lines import is_integer, is_number, parse_json, read_json_lines, truncate_json_lines
from jaxinfra.track.base import FileTracker, RunStatistics

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.jsonl"
SKIPPED_FILE = "skipped.jsonl"

_TEXTS = ("status", "error", "modality", "peak_source", "checkpoint", "report")
_NUMBERS = ("steps", "wall_s", "final_loss", "peak_rss_bytes", "peak_flops_per_device")
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class JsonlTracker(FileTracker):
    """Writes metrics.jsonl line by line, and summary.json at the end, into `run_dir`."""

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        path = self._run_dir / METRICS_FILE
        with storage_errors(path, fix="free space or choose another run directory"):
            self._run_dir.mkdir(parents=True, exist_ok=True)
            (self._run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of the last stop: the run goes on
            rows = truncate_json_lines(path, metrics_row, lambda row: row["step"] <= start_step)
            truncate_json_lines(self._run_dir / SAMPLES_FILE, _sample, lambda sample: sample[0] <= start_step)
            self._file = Appender(path)  # FileTracker._append writes to it
        self._start_s = time.monotonic() - next((row["time_s"] for row in reversed(rows) if "time_s" in row), 0.0)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        failpoint("log", step)
        self._append(_line({"step": step, "time_s": round(time.monotonic() - self._start_s, 4), **metrics}))

    @override
    def log_sample(self, step: int, text: str) -> None:
        with (self._run_dir / SAMPLES_FILE).open("ab") as file:
            file.write(_line({"step": step, "text": text}))

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        text = json.dumps(_encode_nonfinite(values), indent=2, allow_nan=False)
        write_bytes_atomic(self._run_dir / SUMMARY_FILE, text.encode() + b"\n")

    @override
    def log_error(self, error: BaseException) -> None:
        kind = "" if isinstance(error, JaxinfraError) else f"{type(error).__name__} "
        status = "interrupted" if isinstance(error, PeerLostError | HungError) else "failed"
        self.log_summary({"status": status, "error": mask_credentials(" ".join(f"{kind}{error}".split()))})


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl, without damaged lines; raises StorageError if the file is missing."""
    return read_json_lines(path, metrics_row)


def metrics_row(values: Any) -> dict[str, float] | None:
    """Returns a row of metrics from what is on a line; None if it has no step, or a value that is no number."""
    if not isinstance(values, dict) or not is_integer(values.get("step")):
        return None
    row: dict[str, Any] = {
        name: _NONFINITE.get(value, value) if isinstance(value, str) else value for name, value in values.items()
    }
    return row if all(map(is_number, row.values())) and math.isfinite(row.get("time_s", 0.0)) else None


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Reads samples.jsonl, without damaged lines: step and text of each sample."""
    return read_json_lines(path, _sample)


def _sample(values: Any) -> tuple[int, str] | None:
    if not isinstance(values, dict) or not is_integer(values.get("step")) or not isinstance(values.get("text"), str):
        return None
    return values["step"], values["text"]


def read_summary(path: Path) -> dict[str, Any]:
    """Reads summary.json; raises StorageError if the file is missing or damaged."""
    summary = read_json_object(path)
    for name, value in summary.items():
        if not _has_type_of(name, value):
            raise StorageError(f"{path}: its {name} has a wrong type, {type(value).__name__}; restore or delete it")
    return summary


def _has_type_of(name: str, value: Any) -> bool:
    """Whether an entry of a summary has the type of its name; one that is not known here may have any."""
    if name == "validation":
        return isinstance(value, dict) and all(map(is_number, value.values()))
    if name == "baselines":
        return isinstance(value, dict) and all(_has_type_of("validation", each) for each in value.values())
    if name in _TEXTS:
        return isinstance(value, str)
    return value is None or is_number(value) or not (name in _NUMBERS or name.endswith("_median"))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object such as summary.json; raises StorageError if the file is missing or damaged."""
    try:
        with storage_errors(path, action="read", fix="use the directory of a run that has started"):
            value = _decode_nonfinite(parse_json(read_file(path)))
    except RecursionError:
        value = None
    if not isinstance(value, dict):
        raise StorageError(f"{path}: is damaged, not a JSON object; restore or delete it")
    return value


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(_encode_nonfinite(values), allow_nan=False).encode() + b"\n"


def _encode_nonfinite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode_nonfinite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode_nonfinite(item) for key, item in value.items()}
    return _NONFINITE.get(value, value) if isinstance(value, str) else value
