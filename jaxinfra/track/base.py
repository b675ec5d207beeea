"""What a tracker is, and what those that append to a file share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from jaxinfra.storage.appender import Appender

type RunStatistics = Mapping[str, tuple[int | float | str, str]]
"""Derived numbers by name: the value, and its unit or how it was computed."""


class Tracker:
    """One place where metrics go; by itself it does nothing.

    A step is counted from 0. A run that resumes at step s logs step s next.
    """

    def start(self, record: Mapping[str, Any], derived: RunStatistics, *, start_step: int, total_steps: int) -> None:
        """Takes the run record and the derived numbers; forgets what was logged from `start_step` on.

        StorageError where it cannot write where it should.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes metrics of one step; a step may be logged in parts (training, then "eval/...").

        OSError where they could not be written now; they wait, and the next call tries again.
        """

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Takes the final values of the run; called at most once, before `close`."""

    def close(self) -> None:
        """Writes out and lets go of everything, once; StorageError says how many records were lost, if any."""


class FileTracker(Tracker):
    """A tracker that appends records to a file in the run directory; `start` opens it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: Appender | None = None

    def _append(self, record: bytes) -> None:
        if self._file is None:
            raise RuntimeError(f"{type(self).__name__}.log was called before start or after close")
        self._file.append(record)

    @override
    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()
