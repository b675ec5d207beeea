"""Which trackers a run has, and the fan-out that the training loop talks to.

Not for choosing or computing metrics: the loop does that, and hands over Python floats, so that no tracker
ever waits for a device. Invariant: a tracker never ends a run that has begun. Storage that fails after
`start` costs log lines, is reported once, and is counted; storage that fails in `start` is an error before
the first step.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, override

from jaxinfra.config.limits import Count
from jaxinfra.track.base import RunStatistics, Tracker
from jaxinfra.track.console import PlainTextTracker, ProgressBarTracker, stdout_console
from jaxinfra.track.jsonl import JsonlTracker
from jaxinfra.track.tensorboard import TensorBoardTracker

_log = logging.getLogger(__name__)


class MultiTracker(Tracker):
    """Hands everything to each tracker in order; a context manager that closes."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = tuple(trackers)
        self._failures = [0] * len(self._trackers)

    @override
    def start(self, record: Mapping[str, Any], derived: RunStatistics, *, start_step: int, total_steps: int) -> None:
        for tracker in self._trackers:
            tracker.start(record, derived, start_step=start_step, total_steps=total_steps)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log_summary(values))

    @override
    def close(self) -> None:
        """Closes all trackers, whatever any of them raises, then raises the first error."""
        errors: list[Exception] = []
        for i, tracker in enumerate(self._trackers):
            try:
                tracker.close()
            except Exception as error:
                errors.append(error)
            if self._failures[i] > 1:
                _log.error("%s: %d calls failed", type(tracker).__name__, self._failures[i])
                self._failures[i] = 0
        for error in errors[1:]:
            _log.error("a further tracker failed to close: %s", error)
        if errors:
            raise errors[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            _log.exception("a tracker failed to close after the error that ended the run")

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """Calls each tracker; one whose storage fails is reported once, and counted."""
        for i, tracker in enumerate(self._trackers):
            try:
                call(tracker)
            except OSError as error:
                self._failures[i] += 1
                if self._failures[i] == 1:
                    _log.error(f"{type(tracker).__name__}: {error}; training goes on, further failures are counted")


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """How often metrics are logged, and where they go.

    Attributes:
        log_every: steps between two logged ones; the metrics of the steps between stay on the device.
        jsonl: write metrics.jsonl and summary.json, from which the report is made.
        tensorboard: write TensorBoard event files.
        console: "bar" draws a progress bar, "plain" prints a line every `log_every` steps, "auto" is the bar on
            a terminal and plain lines elsewhere, "off" prints nothing.
    """

    log_every: Count = 10
    jsonl: bool = True
    tensorboard: bool = True
    console: Literal["auto", "bar", "plain", "off"] = "auto"

    def due(self, step: int, total_steps: int) -> bool:
        """Says whether step `step`, counted from 0, is one to log: each `log_every`-th, and the last."""
        return (step + 1) % self.log_every == 0 or step + 1 == total_steps


def make_trackers(config: TrackConfig, run_dir: Path) -> MultiTracker:
    """Makes the trackers of `config`; nothing is opened, drawn or printed before `start`.

    In a run of several processes only one has trackers: the others use `Trackers()`.
    """
    trackers: list[Tracker] = []
    if config.jsonl:
        trackers.append(JsonlTracker(run_dir))
    if config.tensorboard:
        trackers.append(TensorBoardTracker(run_dir))
    console = stdout_console()
    if config.console == "bar" or (config.console == "auto" and console.is_interactive):
        trackers.append(ProgressBarTracker(console))
    elif config.console != "off":
        trackers.append(PlainTextTracker(console, config.log_every))
    return MultiTracker(trackers)
