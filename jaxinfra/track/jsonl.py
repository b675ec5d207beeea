"""metrics.jsonl and summary.json: the metrics of a run, for other programs to read.

samples.jsonl has a line `{"step": 12, "text": "..."}` for each text that the model wrote, if the run asks for some.
summary.json has the final values, or the error that ended the run. While a run goes on, or after a kill, there is none.

Each line of metrics.jsonl is a JSON object `{"step": 12, "time_s": 3.5, "loss": 2.1, ...}`. `time_s` is the training
time so far, without the pauses between a stop and a resume. JSON has no NaN or infinity: they are the strings "nan",
"inf" and "-inf", which `read_metrics` turns back into floats. `step` is the number of completed
steps. A run that resumes at step s drops the lines after s.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from jaxinfra.errors import HungError, JaxinfraError, PeerLostError, StorageError
from jaxinfra.failpoints import failpoint
from jaxinfra.storage.appender import Appender
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.storage.errors import storage_errors
from jaxinfra.track.base import FileTracker, RunStatistics

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
SAMPLES_FILE = "samples.jsonl"
SKIPPED_FILE = "skipped.jsonl"

_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_log = logging.getLogger(__name__)


class JsonlTracker(FileTracker):
    """Writes metrics.jsonl line by line, and summary.json at the end, into `run_dir`."""

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        path = self._run_dir / METRICS_FILE
        with storage_errors(path, fix="free space or choose another run directory"):
            self._run_dir.mkdir(parents=True, exist_ok=True)
            (self._run_dir / SUMMARY_FILE).unlink(missing_ok=True)  # of the last stop: the run goes on
            elapsed_s = truncate_metrics(path, start_step)
            if (samples := self._run_dir / SAMPLES_FILE).exists():
                kept = [each for each in read_samples(samples) if each[0] <= start_step]
                write_bytes_atomic(samples, b"".join(map(_sample_line, kept)))
            self._file = Appender(path)  # FileTracker._append writes to it
        self._start_s = time.monotonic() - elapsed_s

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        failpoint("log", step)
        line = {"step": step, "time_s": round(time.monotonic() - self._start_s, 4), **_encode_nonfinite(metrics)}
        self._append(json.dumps(line, allow_nan=False).encode() + b"\n")

    @override
    def log_sample(self, step: int, text: str) -> None:
        with (self._run_dir / SAMPLES_FILE).open("ab") as file:
            file.write(_sample_line((step, text)))

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
    """Reads metrics.jsonl; a kill may have torn the last line, which is then left out.

    Raises StorageError if the file is missing, or if another line is not a JSON object with a step.
    """
    rows = [_parse_line(line) for line in _read_bytes(path).splitlines()]
    if None in rows[:-1]:
        raise StorageError(f"{path}:{rows.index(None) + 1}: not a JSON object with a step; delete this line")
    return [row for row in rows if row is not None]


def read_samples(path: Path) -> list[tuple[int, str]]:
    """Reads samples.jsonl: step and text of each sample; a kill may have torn the last line, which is then left out.

    Raises StorageError if another line is not a JSON object with a step and a text.
    """
    samples, lines = [], _read_bytes(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            samples.append((int(row["step"]), str(row["text"])))
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise StorageError(
                    f"{path}:{number}: not a JSON object with step and text; delete this line"
                ) from error
    return samples


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object such as summary.json; raises StorageError if the file is missing or damaged."""
    try:
        value = json.loads(_read_bytes(path))
    except ValueError as error:
        raise StorageError(f"{path}: not JSON ({error}); restore or delete it") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path}: is a {type(value).__name__}, expected a JSON object; restore or delete it")
    return _decode_nonfinite(value)


def _read_bytes(path: Path) -> bytes:
    with storage_errors(path, action="read", fix="use the directory of a run that has started"):
        return path.read_bytes()


def truncate_metrics(path: Path, start_step: int) -> float:
    """Drops unreadable lines and lines of steps after `start_step`; returns `time_s` of the last line kept, or 0.

    The file is a new one: what a start that has lost the run still appends goes to the old one.
    """
    if not path.exists():
        return 0.0
    rows = [(line, _parse_line(line)) for line in path.read_bytes().splitlines()]
    if unreadable := sum(row is None for _, row in rows):
        _log.warning("%s: %d unreadable lines dropped; a killed run leaves at most one", path, unreadable)
    kept = [(line, row) for line, row in rows if row is not None and row["step"] <= start_step]
    write_bytes_atomic(path, b"".join(line + b"\n" for line, _ in kept))
    return next((row["time_s"] for _, row in reversed(kept) if "time_s" in row), 0.0)


def _sample_line(sample: tuple[int, str]) -> bytes:
    step, text = sample
    return json.dumps({"step": step, "text": text}).encode() + b"\n"


def _parse_line(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    # Values are numbers, or the strings that stand for numbers that JSON lacks.
    strings = (value for value in row.values() if isinstance(value, str))
    return _decode_nonfinite(row) if all(string in _NONFINITE for string in strings) else None


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
