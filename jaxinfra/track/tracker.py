"""Chooses the trackers of a run, and passes metrics to all of them.

A storage failure in `start` ends the run before its first step. Later failures may lose log lines but do not end the
run: the first of each tracker is reported, the others are counted. A start that has lost its run to another one writes
nothing any more.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, override

from jaxinfra.command import command_line
from jaxinfra.config import diff
from jaxinfra.config.extensible import is_user_class
from jaxinfra.config.text import format_value
from jaxinfra.errors import ConfigError, RunInUseError, StorageError
from jaxinfra.packages import require_optional
from jaxinfra.storage.credentials import mask_credentials
from jaxinfra.track.audit import AuditTracker
from jaxinfra.track.base import RunStatistics, Tracker, TrackerConfig
from jaxinfra.track.config import Mlflow, TrackConfig
from jaxinfra.track.console import PlainTextTracker, ProgressBarTracker, stdout_console
from jaxinfra.track.jsonl import JsonlTracker
from jaxinfra.track.mlflow import MLflowRun
from jaxinfra.track.prometheus import PrometheusTracker
from jaxinfra.track.remote import RemoteTracker
from jaxinfra.track.report_tracker import ReportTracker
from jaxinfra.track.wandb import WandbRun
from jaxinfra.user_code import user_code_errors

_log = logging.getLogger(__name__)


class MultiTracker(Tracker):
    """Passes everything to each tracker in order; a context manager that closes them.

    If `check` raises RunInUseError, since another start has taken over the run, the trackers are abandoned.
    """

    def __init__(self, trackers: Sequence[Tracker] = (), check: Callable[[], None] = lambda: None) -> None:
        self._trackers, self._check = tuple(trackers), check
        self._failures = [0] * len(self._trackers)

    @override
    def start(self, record: Mapping[str, Any], statistics: RunStatistics, *, start_step: int, total_steps: int) -> None:
        for tracker in self._trackers:
            with user_code_errors(type(tracker), "track.trackers"):
                tracker.start(record, statistics, start_step=start_step, total_steps=total_steps)

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, metrics))

    @override
    def finish_step(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.finish_step(step)

    @override
    def log_save(self, step: int) -> None:
        self._each(lambda tracker: tracker.log_save(step))

    @override
    def log_saved(self, step: int) -> None:
        self._each(lambda tracker: tracker.log_saved(step))

    @override
    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._check()
        self._each(lambda tracker: tracker.log_summary(values))

    @override
    def close(self) -> None:
        """Closes all trackers, even if some raise, then raises the first error."""
        self._end(lambda tracker: tracker.close())

    @override
    def abandon(self) -> None:
        self._end(lambda tracker: tracker.abandon())

    def _end(self, end: Callable[[Tracker], None]) -> None:
        errors: list[Exception] = []
        for i, tracker in enumerate(self._trackers):
            try:
                end(tracker)
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

    @override
    def log_sample(self, step: int, text: str) -> None:
        masked = mask_credentials(text)
        self._each(lambda tracker: tracker.log_sample(step, masked))

    @override
    def log_profile(self, step: int, text: str) -> None:
        self._each(lambda tracker: tracker.log_profile(step, text))

    @override
    def log_note(self, step: int, text: str) -> None:
        self._each(lambda tracker: tracker.log_note(step, text))

    @override
    def log_error(self, error: BaseException) -> None:
        self._each(lambda tracker: tracker.log_error(error))

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        lost = error if isinstance(error, RunInUseError) else self._find_loss()
        try:
            if lost is not None:
                self.abandon()
                return
            try:
                if error is not None:
                    self.log_error(error)
            finally:
                self.close()
        except Exception:
            if error is None:
                raise
            _log.exception("a tracker failed to close after the error that ended the run")
        finally:
            if error is None and lost is not None:
                raise lost

    def _find_loss(self) -> RunInUseError | None:
        try:
            self._check()
        except RunInUseError as error:
            return error
        except StorageError as error:  # the trackers will notice, too
            _log.warning("%s", error)
        return None

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """Calls each tracker; counts failures of storage and of user classes, and reports the first of each tracker."""
        for i, tracker in enumerate(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                if not isinstance(error, OSError) and not is_user_class(type(tracker)):
                    raise
                self._failures[i] += 1
                if self._failures[i] == 1:
                    a_bug = not isinstance(error, OSError)
                    named = f"{type(tracker).__name__}: {f'{type(error).__name__}: ' if a_bug else ''}{error}"
                    _log.error(f"{named}; training goes on, further failures are counted", exc_info=a_bug)


def make_trackers(
    config: TrackConfig, run_dir: Path, location: str | None = None, check: Callable[[], None] = lambda: None
) -> MultiTracker:
    """Makes the trackers of a run, the report included; `start` opens their files in `run_dir`.

    `location` says where the run is, by default there; `check` raises RunInUseError if another start has taken it over.
    """
    trackers: list[Tracker] = []
    if config.audit is not None:  # before the summary is written: a run with one is not finished again
        trackers.append(AuditTracker(config.audit, location or str(run_dir)))
    if config.jsonl:
        trackers.append(JsonlTracker(run_dir))
    trackers.append(ReportTracker(run_dir, check))  # after the tracker that writes what the report is made from
    if config.tensorboard:
        from jaxinfra.track.tensorboard import TensorBoardTracker  # imports slowly, and only process 0 needs it

        trackers.append(TensorBoardTracker(run_dir))
    announce = config.console != "off"
    if config.wandb.project is not None:
        require_optional("wandb", needed_by="track.wandb", install="jaxinfra[wandb]")
        setting = f"project={config.wandb.project}"
        trackers.append(RemoteTracker(WandbRun(config.wandb, run_dir), "track.wandb", setting, announce=announce))
    if config.mlflow.uri is not None:
        trackers.append(mlflow_tracker(config.mlflow, run_dir, location or str(run_dir), announce=announce))
    if config.prometheus.port is not None:
        trackers.append(PrometheusTracker(config.prometheus, run_dir))
    console = stdout_console()
    if config.console == "bar" or (config.console == "auto" and console.is_interactive):
        trackers.append(ProgressBarTracker(console, location or run_dir))
    elif config.console != "off":
        trackers.append(PlainTextTracker(console, location or run_dir, config.log_every))
    return MultiTracker([*trackers, *(_make_tracker(each, run_dir) for each in config.trackers)], check)


def mlflow_tracker(config: Mlflow, run_dir: Path, location: str, *, announce: bool = True) -> RemoteTracker:
    """Makes the tracker of MLflow, whose `sync` sends later what the server has not got."""
    require_optional("mlflow", needed_by="track.mlflow", install="jaxinfra[mlflow]")
    remote, setting = MLflowRun(config, run_dir), f"uri={config.uri}"
    fields = [f"track.mlflow.{each.path}={format_value(each.right)}" for each in diff(Mlflow(), config)]
    command = command_line("runs", "sync", location, *fields)  # works if a start that does not train has set them, too
    return RemoteTracker(remote, "track.mlflow", setting, announce=announce, run_dir=run_dir, sync_command=command)


def _make_tracker(config: TrackerConfig, run_dir: Path) -> Tracker:
    """Makes a tracker; raises ConfigError if `make_tracker` returns something else."""
    with user_code_errors(type(config), "track.trackers"):
        tracker = config.make_tracker(run_dir)
    if not isinstance(tracker, Tracker):
        name = type(config).__qualname__
        raise ConfigError(f"{name}.make_tracker: returned {type(tracker).__name__}; return a jaxinfra.Tracker")
    return tracker
