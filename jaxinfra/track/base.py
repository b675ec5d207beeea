"""The interface of trackers, and a base class for trackers that append to a file."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from jaxinfra.config import Extensible
from jaxinfra.storage.appender import Appender

type RunStatistics = Mapping[str, tuple[int | float | str, str]]
"""Statistics of a run by name: the value, and its unit or formula."""


class Tracker:
    """Receives the metrics of a run; this base class ignores them. `step` is the number of completed steps."""

    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        """Receives the run record and statistics; a resumed run drops what was logged after `start_step`.

        Raises StorageError if the output cannot be written.
        """

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Receives metrics of one step; one step may log several times (training, then "eval/...").

        Raises OSError if they cannot be written now; they stay in memory, and the next call tries again.
        """

    def log_sample(self, step: int, text: str) -> None:
        """Receives a text that the model wrote after a step."""

    def log_profile(self, step: int, text: str) -> None:
        """Receives the operations that take longest, as a table, from a profile that ends with a step."""

    def log_note(self, step: int, text: str) -> None:
        """Receives a line about the run after a step, such as how often it saves."""

    def finish_step(self, step: int) -> None:
        """Is called after every step, logged or not; must return at once."""

    def log_save(self, step: int) -> None:
        """Is called when a checkpoint of the state after `step` is being written."""

    def log_saved(self, step: int) -> None:
        """Is called once a checkpoint is known to be complete: at the latest when the next one is due."""

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Receives the final values of the run; called at most once, before `close`."""

    def log_error(self, error: BaseException) -> None:
        """Receives the error that ends the run, in place of the final values; called at most once, before `close`."""

    def close(self) -> None:
        """Writes what is pending and frees resources; raises StorageError if records were lost."""

    def abandon(self) -> None:
        """Frees resources and writes nothing, in place of `close`: another start has taken over the run."""


class TrackerConfig(Extensible, ABC):
    """The base of your own trackers for `TrackConfig.trackers`: inherit from it with a frozen dataclass."""

    @abstractmethod
    def make_tracker(self, run_dir: Path) -> Tracker:
        """Makes the tracker; it must not open files before its `start`."""


class FileTracker(Tracker):
    """A tracker that appends records to a file in the run directory, which `start` opens."""

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

    @override
    def abandon(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.abandon()
