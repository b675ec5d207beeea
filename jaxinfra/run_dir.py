"""The directory of a run: its lock, its record, and the checks that a config may go on in it."""

import fcntl
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import Difference, diff, read_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.record import decode_record
from jaxinfra.data.interfaces import Dataset
from jaxinfra.errors import CheckpointError, ConfigError
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.storage.checks import make_writable
from jaxinfra.track.jsonl import read_json_object
from jaxinfra.track.report import write_report


class RunDirectory:
    """`ROOT/NAME`, with run.json, metrics.jsonl, summary.json, tensorboard/, checkpoints/ and report.html."""

    def __init__(self, path: Path):
        self.path, self.record, self.report = path, path / "run.json", path / "report.html"
        self.checkpoints, self.metrics = path / "checkpoints", path / "metrics.jsonl"

    def existing_record(self) -> Mapping[str, Any]:
        """Returns the run record; where it is lost, the one that the newest checkpoint was saved with; else {}.

        A damaged run record is a ConfigError, a damaged one of a checkpoint a CheckpointError.
        """
        if self.record.exists():
            return read_record(self.record)
        if not self.checkpoints.exists():
            return {}
        with CheckpointManager(self.checkpoints, read_only=True) as checkpoints:
            step = checkpoints.latest_step()
            return {} if step is None else checkpoints.load_record(step)

    def data_versions(self, run: Run) -> Sequence[str]:
        """Returns the store versions that the run has started on; () for a new run, or one of another config."""
        found = self.existing_record()
        return found.get("data_versions", ()) if found and not self._changed(run, found) else ()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds its lock, so that no second process trains this run."""
        make_writable(self.path)
        holder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(holder)
            raise ConfigError(
                f"{self.path}: another process is training this run; wait for it, or use name=ANOTHER"
            ) from None
        try:
            yield
        finally:
            os.close(holder)

    def check(self, run: Run, data: Dataset) -> None:
        """Raises ConfigError if the run in the directory has another config, other data or other first parameters."""
        found = self.existing_record()
        if changed := self._changed(run, found):
            first = changed[0]
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ConfigError(
                f"{self.path}: holds a run of another config: {first.path} is {first.left} there and {first.right} "
                f"here{more}; use name=ANOTHER, or change it back"
            )
        if found.get("data", data.fingerprint) != data.fingerprint:
            raise ConfigError(
                f"{self.path}: has started on data with fingerprint {found['data']}, {data.name} has "
                f"{data.fingerprint}; use name=ANOTHER, or the version that it has started on"
            )
        started_from = found.get("init")
        if not _same_init(started_from, run.init):
            before = "none" if started_from is None else f"{started_from['run']}@{started_from['step']}"
            raise ConfigError(
                f"{self.path}: has started with init={before}, and init={run.init or 'none'} here; use name=ANOTHER, "
                f"or init={before}"
            )

    def finished_summary(self, completed_steps: int) -> dict[str, Any]:
        """Returns the summary of a run that has nothing left to do."""
        summary = self.path / "summary.json"
        found = read_json_object(summary) if summary.exists() else {}
        if self.record.exists() and not self.report.exists():
            write_report(self.path)
        return {**found, "steps": completed_steps, "status": "finished before"}

    def _changed(self, run: Run, found: Mapping[str, Any]) -> list[Difference]:
        """Returns how a record differs from a config, in what changes the numbers."""
        recorded = decode_record(self.record, dict(found), Run, ClassFinder.from_config(run))
        return diff(recorded, run, fingerprinted_only=True)


class TrainedParams(NamedTuple):
    """Parameters of a run, and where they are from.

    Attributes:
        params: those after `step`; the averaged ones where the run keeps them.
        step: completed steps.
        fingerprint: of the config of the run.
    """

    params: Any
    step: int
    fingerprint: str


def load_params(source: str | Path, program: Program) -> TrainedParams:
    """Restores the parameters of a run onto the mesh of a program whose model has the same parameters.

    `source` is a run directory, `runs/base` for its newest checkpoint or `runs/base@500` for that of a step. Raises
    ConfigError where there is no run, or its first parameter that differs is named; CheckpointError where no
    checkpoint can be read.
    """
    path, step = parse_source(source)
    directory = RunDirectory(path)
    record = directory.existing_record()
    if not record:
        raise ConfigError(f"{path}: no run.json there; name the directory of a run, such as runs/quickstart")
    missing = f"{directory.checkpoints}: no checkpoint{'' if step is None else f' of step {step}'}"
    if not directory.checkpoints.exists():
        raise CheckpointError(f"{missing} yet; train until the first one is saved")
    with program.on_mesh, CheckpointManager(directory.checkpoints, read_only=True) as checkpoints:
        found = checkpoints.latest_step() if step is None else step
        if found is None or found not in checkpoints.all_steps():
            have = ", ".join(map(str, checkpoints.all_steps())) or "none"
            raise CheckpointError(f"{missing}; it has {have}: train until the next one is saved")
        averaged = record["config"].get("optim", {}).get("ema_decay") is not None
        wanted = program.averaged_params if averaged else program.params
        params = checkpoints.restore_params(found, wanted, subtree="ema" if averaged else "params")
    return TrainedParams(params, found, record.get("fingerprint", ""))


def parse_source(source: str | Path) -> tuple[Path, int | None]:
    """Splits `runs/base@500` into the directory and the step; without a step it is None."""
    path, at, step = str(source).rpartition("@")
    return (Path(path), int(step)) if at and step.isdigit() else (Path(source), None)


def _same_init(recorded: Mapping[str, Any] | None, init: str | None) -> bool:
    """Whether a run that has started from `recorded` may go on with this `init`."""
    if recorded is None or init is None:
        return recorded is None and init is None
    path, step = parse_source(init)
    if step not in (None, recorded["step"]):
        return False
    directory = RunDirectory(path)
    if directory.record.exists():
        return directory.existing_record().get("fingerprint") == recorded["fingerprint"]
    return str(path) == recorded["run"]  # that run is gone: its parameters are not needed any more
