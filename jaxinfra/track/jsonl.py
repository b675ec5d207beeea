"""metrics.jsonl and summary.json: the record of a run that other programs read.

Each line of metrics.jsonl is one JSON object `{"step": 12, "time_s": 3.5, "loss": 2.1, ...}`. `time_s` counts
the seconds that the run has been going, the pauses between a stop and a resume left out. A value that is not
finite is the string "nan", "inf" or "-inf", since JSON has no such numbers; `read` turns it back.

Invariant: the file holds whole lines, in the order logged, and after a resume at step s none of a step that
is about to be run again. A full disk loses nothing while the run lives: lines wait in memory (bounded) until
the next one can be written.
"""

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfra.errors import StorageError
from jaxinfra.track.files import replace_bytes
from jaxinfra.track.text import Derived

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_PENDING_LINES = 10_000  # about 3 MB of host memory at 300 bytes a line

_log = logging.getLogger(__name__)


class Jsonl:
    """Writes metrics.jsonl line by line, and summary.json at the end, into `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._fd: int | None = None
        self._size_bytes = 0
        self._pending: deque[bytes] = deque()
        self._dropped = 0
        self._zero_s = 0.0

    def start(
        self, record: Mapping[str, Any], derived: Derived, *, start_step: int, total_steps: int
    ) -> None:
        """Opens the file and drops what a killed run left of steps from `start_step` on.

        Raises:
            StorageError: the run directory cannot be written.
        """
        path = self._run_dir / METRICS
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            elapsed_s = cut(path, start_step)
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            self._size_bytes = os.fstat(self._fd).st_size
        except OSError as error:
            raise StorageError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another run directory"
            ) from error
        self._zero_s = time.monotonic() - elapsed_s

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line.

        Raises:
            OSError: it could not be written now; it waits, and the next call tries again.
        """
        line = {"step": step, "time_s": round(time.monotonic() - self._zero_s, 4), **_encode(metrics)}
        if len(self._pending) == _PENDING_LINES:
            self._pending.popleft()
            self._dropped += 1
        self._pending.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._write()

    def summary(self, values: Mapping[str, Any]) -> None:
        """Replaces summary.json by `values`."""
        text = json.dumps(_encode(values), indent=2, allow_nan=False)
        replace_bytes(self._run_dir / SUMMARY, text.encode() + b"\n")

    def close(self) -> None:
        """Writes what still waits and closes the file; does nothing the second time.

        Raises:
            StorageError: lines were lost; the message says how many.
        """
        if self._fd is None:
            return
        try:
            self._write()
        except OSError as error:
            self._dropped += len(self._pending)
            raise StorageError(
                f"{self._run_dir / METRICS}: {self._dropped} lines lost ({error.strerror}); free space there"
            ) from error
        finally:
            os.close(self._fd)
            self._fd = None
        if self._dropped:
            raise StorageError(
                f"{self._run_dir / METRICS}: {self._dropped} lines lost while the disk was full"
            )

    def _write(self) -> None:
        if self._fd is None:
            raise RuntimeError("Jsonl.log was called before start or after close")
        if not self._pending:
            return
        data = b"".join(self._pending)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._size_bytes)  # half a line must not stand before a whole one
            raise
        self._size_bytes += len(data)
        self._pending.clear()


def read(path: Path) -> list[dict[str, float]]:
    """Reads metrics.jsonl; a last line torn by a kill is left out.

    Raises:
        StorageError: a line before the last is no JSON object with a step.
    """
    rows: list[dict[str, float]] = []
    lines = path.read_bytes().splitlines()
    for i, line in enumerate(lines):
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif i < len(lines) - 1:
            raise StorageError(f"{path}:{i + 1}: not a JSON object with a step; delete this line")
    return rows


def cut(path: Path, start_step: int) -> float:
    """Drops the lines of steps >= `start_step`, and lines that cannot be read, by one atomic replacement.

    Returns:
        `time_s` of the last line kept, 0 if there is none.
    """
    if not path.exists():
        return 0.0
    old = path.read_bytes()
    kept: list[bytes] = []
    unreadable = 0
    elapsed_s = 0.0
    for line in old.splitlines():
        row = _parse(line)
        if row is None:
            unreadable += 1
        elif row["step"] < start_step:
            kept.append(line + b"\n")
            elapsed_s = row.get("time_s", elapsed_s)
    if unreadable:
        _log.warning("%s: %d unreadable lines dropped; a killed run leaves at most one", path, unreadable)
    new = b"".join(kept)
    if new != old:
        replace_bytes(path, new)
    return elapsed_s


def _parse(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    if any(isinstance(value, str) and value not in _NOT_FINITE for value in row.values()):
        return None
    return {key: _NOT_FINITE[value] if isinstance(value, str) else value for key, value in row.items()}


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
