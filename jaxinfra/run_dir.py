"""The directory of a run: its lease, its run record, and the checks before a run resumes in it."""

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import Difference, diff, read_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.record import decode_record
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.data.interfaces import Dataset
from jaxinfra.errors import CheckpointError, ConfigError
from jaxinfra.program import Program
from jaxinfra.run import Run
from jaxinfra.runtime.peers import Peers, current_peers
from jaxinfra.storage.checks import make_writable
from jaxinfra.storage.connection import normalize_url
from jaxinfra.storage.lease import Lease, hold
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.mirror import Mirror, fetch
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.jsonl import METRICS_FILE, SUMMARY_FILE, read_json_object
from jaxinfra.track.report import REPORT_FILE, write_report
from jaxinfra.track.runs import RUN_FILES, no_run_error

_SEEN_S = 90.0  # NFS shows a new file after up to a minute (acdirmax, nfs(5))
_LOOK_S = 0.2


class RunDirectory:
    """`ROOT/NAME`, with run.json, metrics.jsonl, summary.json, tensorboard/, checkpoints/ and report.html.

    ROOT is a folder, or an `s3://` or `gs://` URL. Then the small files are written to a temporary folder and copied
    into the bucket in the background; only process 0 does so. Checkpoints go there directly.

    Attributes:
        location: the path or URL, for people.
        path: the folder of the small files.
        checkpoints: the path or URL of the checkpoints.
    """

    def __init__(self, location: str | Path):
        self.is_remote = is_remote(location)
        self.location = normalize_url(str(location)) if self.is_remote else str(location)
        self.path = Path(location)
        if self.is_remote:
            temporary = tempfile.mkdtemp(prefix="jaxinfra-run-")
            remove = weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            current_peers().last_calls.append(remove)
            self.path = Path(temporary, self.location.rpartition("/")[2])
            self.path.mkdir()
        self.record = self.path / RECORD_FILE
        self.checkpoints = f"{self.location}/checkpoints" if self.is_remote else self.path / "checkpoints"
        self.metrics = self.path / METRICS_FILE
        self.report = self.path / REPORT_FILE

    def has_checkpoints(self) -> bool:
        """Whether there may be checkpoints."""
        return self.is_remote or Path(self.checkpoints).exists()

    def fetch(self) -> Path:
        """Returns the folder of the small files, as they are now in the bucket."""
        if self.is_remote:
            fetch(ObjectStore(self.location), RUN_FILES, self.path)
        return self.path

    def existing_record(self) -> Mapping[str, Any]:
        """Returns the run record (run.json); if it is missing, the copy in the newest checkpoint; else {}.

        Raises ConfigError if run.json is damaged, CheckpointError if the copy is.
        """
        if self.is_remote:
            fetch(ObjectStore(self.location), [RECORD_FILE], self.path)
        if self.record.exists():
            return read_record(self.record)
        if not self.has_checkpoints():
            return {}
        with CheckpointManager(self.checkpoints, read_only=True) as checkpoints:
            step = checkpoints.latest_step()
            return {} if step is None else checkpoints.load_record(step)

    def data_versions(self, run: Run) -> Sequence[str]:
        """Returns the dataset versions that the run started with; () for a new run or a changed config."""
        record = self.existing_record()
        if not record or self._changes(run, record):
            return ()
        return record.get("data_versions", ())

    @contextmanager
    def owned(self) -> Iterator["Owned"]:
        """Creates the directory and holds its lease, so that only one run trains in it."""
        if not self.is_remote:
            make_writable(self.path)
        with hold(self.location) as lease, current_peers().last_call(lease.release):
            if not self.is_remote:
                yield Owned(lease, lambda: None)
                return
            self.fetch()
            with Mirror(self.path, ObjectStore(self.location), lease.check_now) as mirror:
                yield Owned(lease, mirror.sync)

    def require_shared(self, peers: Peers) -> None:
        """Raises ConfigError in a process that does not see the files which process 0 writes into the directory."""
        if peers.count == 1 or self.is_remote:
            return
        name = f".shared-{os.getpid()}"
        if peers.index == 0:
            (self.path / name).touch()
        try:
            name = peers.broadcast(name)  # after it exists: NFS remembers for a minute that a file was missing
            deadline_s = time.monotonic() + _SEEN_S
            while not self._lists(name):
                if time.monotonic() > deadline_s:
                    raise ConfigError(
                        f"{self.location}: what {peers.name_of(0)} writes there does not arrive; "
                        "use root=FOLDER on a file system that all hosts share"
                    )
                time.sleep(_LOOK_S)
            peers.gather(None)
        finally:
            if peers.index == 0:
                (self.path / name).unlink(missing_ok=True)

    def _lists(self, name: str) -> bool:
        """Whether a listing has this file. Unlike a lookup of its name, a listing asks an NFS server each time."""
        try:
            os.listdir(self.path.parent)  # the directory itself may be new
            return name in os.listdir(self.path)
        except FileNotFoundError:
            return False

    def check(self, run: Run, data: Dataset) -> None:
        """Raises ConfigError if the run in the directory has another config, other data or another `init`."""
        record = self.existing_record()
        if changes := self._changes(run, record):
            first = changes[0]
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise ConfigError(
                f"{self.location}: holds a run of another config: {first.path} is {first.left} there and "
                f"{first.right} here{more}; use name=ANOTHER, with init={self.location} to start from its parameters, "
                "or change it back"
            )
        if record.get("data", data.fingerprint) != data.fingerprint:
            raise ConfigError(
                f"{self.location}: has started on data with fingerprint {record['data']}, {data.name} has "
                f"{data.fingerprint}; use name=ANOTHER, or the version that it has started on"
            )
        started_from = record.get("init")
        if not _same_init(started_from, run.init):
            before = "none" if started_from is None else f"{started_from['run']}@{started_from['step']}"
            raise ConfigError(
                f"{self.location}: has started with init={before}, and init={run.init or 'none'} here; use "
                f"name=ANOTHER, or init={before}"
            )

    def finished_summary(self, completed_steps: int) -> dict[str, Any]:
        """Returns the summary of a run that is already finished; writes its report if that is missing."""
        summary = self.path / SUMMARY_FILE
        values = read_json_object(summary) if summary.exists() else {}
        if self.record.exists() and not self.report.exists() and not self.is_remote:
            write_report(self.path)
        return {**values, "steps": completed_steps, "status": "finished before"}

    def _changes(self, run: Run, record: Mapping[str, Any]) -> list[Difference]:
        """Returns the fingerprinted fields in which a run record differs from a config."""
        recorded = decode_record(self.record, record, ClassFinder.from_config(run))
        return diff(recorded, run, fingerprinted_only=True)


class Owned(NamedTuple):
    """A run directory that this process owns.

    Attributes:
        lease: of the directory.
        sync: copies the small files into the bucket now, if the directory is there.
    """

    lease: Lease
    sync: Callable[[], None]


class TrainedParams(NamedTuple):
    """Parameters of a run, with their origin.

    Attributes:
        params: the parameters after `step`, averaged if the run keeps an average.
        step: number of completed steps.
        fingerprint: fingerprint of the run's config.
    """

    params: Any
    step: int
    fingerprint: str


def load_params(source: str | Path, program: Program) -> TrainedParams:
    """Restores the parameters of a run onto the mesh of a program whose model has the same parameters.

    `source` is a run directory, such as `runs/base` for its newest checkpoint, or `runs/base@500` for step 500. Raises
    ConfigError if there is no run, or if a parameter differs (it names the first one), and CheckpointError if no
    checkpoint can be read.
    """
    location, step = parse_source(source)
    directory = RunDirectory(location)
    record = directory.existing_record()
    if not record:
        raise no_run_error(location)
    missing = f"{directory.checkpoints}: no checkpoint{'' if step is None else f' of step {step}'}"
    if not directory.has_checkpoints():
        raise CheckpointError(f"{missing} yet; train until the first one is saved")
    with program.on_mesh, CheckpointManager(directory.checkpoints, read_only=True) as checkpoints:
        # That run may still be training: all processes take the checkpoint that process 0 sees.
        step = current_peers().broadcast(checkpoints.latest_step() if step is None else step)
        if step is None or step not in checkpoints.all_steps():
            available = ", ".join(map(str, checkpoints.all_steps())) or "none"
            raise CheckpointError(f"{missing}; it has {available}: train until the next one is saved")
        if _recorded(record, "optim", "ema_decay") is not None:
            params = checkpoints.restore_params(step, program.averaged_params, subtree="ema")
        else:
            dtype = _recorded(record, "precision", "params") or "float32"
            params = checkpoints.restore_params(step, program.params_stored_as(dtype), subtree="params")
    return TrainedParams(params, step, record.get("fingerprint", ""))


def _recorded(record: Mapping[str, Any], part: str, field: str) -> Any:
    """Returns a field of the config in a run record; None if the record has none."""
    config = record.get("config")
    fields = config.get(part) if isinstance(config, dict) else None
    return fields.get(field) if isinstance(fields, dict) else None


def join_location(root: str, name: str) -> str:
    """Returns the path or URL of a run's directory."""
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else str(Path(root, name))


def parse_source(source: str | Path) -> tuple[str, int | None]:
    """Splits `runs/base@500` into directory and step; `runs/base` has the step None."""
    path, at, step = str(source).rpartition("@")
    has_step = at and step.isascii() and step.isdecimal()  # else the "@" is part of the path
    return (path, int(step)) if has_step else (str(source), None)


def _same_init(recorded: Mapping[str, Any] | None, init: str | None) -> bool:
    """Whether the field `init` names the parameters that a run started from, which its record holds as `recorded`."""
    if recorded is None or init is None:
        return recorded is None and init is None
    if not isinstance(recorded, dict) or {"run", "step", "fingerprint"} - recorded.keys():
        raise ConfigError(f"run.json: its init={recorded} is damaged; restore the file")
    path, step = parse_source(init)
    if step not in (None, recorded["step"]):
        return False
    record = RunDirectory(path).existing_record()
    if record:
        return record.get("fingerprint") == recorded["fingerprint"]
    return path == recorded["run"]  # that run may be deleted: a resumed run does not load it again
