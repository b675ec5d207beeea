"""The directory of a run: its lease, its run record, and the checks before a run resumes in it."""

import logging
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jaxinfra.checkpoint.bucket_index import owner_token
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.config import Difference, diff, leaves, read_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.record import decode_record
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.data.interfaces import Dataset
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.processes.peers import Peers, current_peers
from jaxinfra.processes.step_file import round_number
from jaxinfra.run import Run
from jaxinfra.storage.atomic import delete_temporaries
from jaxinfra.storage.checks import make_writable
from jaxinfra.storage.connection import normalize_url
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.lease import Lease, hold
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.mirror import Mirror, fetch
from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.jsonl import METRICS_FILE, SUMMARY_FILE, read_summary
from jaxinfra.track.report import REPORT_FILE
from jaxinfra.track.runs import RUN_FILES, parse_source

_SEEN_S = 90.0  # NFS shows a new file after up to a minute (acdirmax, nfs(5))
_LOOK_S = 0.2

_log = logging.getLogger(__name__)


class RunDirectory:
    """`ROOT/NAME`, with run.json, metrics.jsonl, summary.json, tensorboard/, checkpoints/ and report.html.

    ROOT is a folder, or an `s3://` or `gs://` URL. Then the small files are written to a temporary folder and copied
    into the bucket in the background; only process 0 does so. Checkpoints go there directly.
    """

    def __init__(self, location: str | Path, peers: Peers | None = None):
        """Names the directory; `peers` are the processes of the run, by default those of this process."""
        self._peers = current_peers() if peers is None else peers
        self.is_remote = is_remote(location)
        self.location = normalize_url(str(location)) if self.is_remote else str(location)  # path or URL, for people
        self.path = Path(location)  # the folder of the small files
        if self.is_remote:
            temporary = tempfile.mkdtemp(prefix="jaxinfra-run-")
            remove = weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
            self._peers.last_calls.append(remove)  # `exit` skips what Python does at its end
            self.path = Path(temporary, self.location.rpartition("/")[2])
            self.path.mkdir()
        self.record = self.path / RECORD_FILE
        self.checkpoints = f"{self.location}/checkpoints" if self.is_remote else self.path / "checkpoints"
        self.metrics = self.path / METRICS_FILE
        self.report = self.path / REPORT_FILE

    def has_checkpoints(self) -> bool:
        """Whether there may be checkpoints."""
        return self.is_remote or Path(self.checkpoints).exists()

    def existing_record(self) -> Mapping[str, Any]:
        """Returns the run record (run.json); if it is missing, the copy in the newest checkpoint; else {}.

        Raises ConfigError if run.json is damaged, CheckpointError if the copy is.
        """
        if self.is_remote:
            fetch(self.location, [RECORD_FILE], self.path)
        if self.record.exists():
            return read_record(self.record)
        if not self.has_checkpoints():
            return {}
        with CheckpointManager(self.checkpoints, read_only=True) as checkpoints:
            newest = checkpoints.newest(checkpoints.manifest)
            return {} if newest is None else newest[1].record

    def data_versions(self, run: Run) -> Sequence[str]:
        """Returns the dataset versions that the run started with; () for a new run or other data in the config."""
        record = self.existing_record()
        if not record or any(change.path.partition(".")[0] == "data" for change in self._changes(run, record)):
            return ()
        return record.get("data_versions", ())

    @contextmanager
    def owned(self) -> Iterator["Owned"]:
        """Creates the directory and holds its lease, so that only one start trains in it.

        The small files of a bucket are fetched, and copied back in the background and at the end. Raises RunInUseError
        if another start holds the lease, StorageError if the directory cannot be read or written.
        """
        if not self.is_remote:
            make_writable(self.path)
        # The lease may be missing where the checkpoints are not, as in a copy: its tokens go on from theirs.
        after = owner_token(str(self.checkpoints)) if self.is_remote else 0
        with (
            hold(self.location, after=after, round_number=round_number()) as lease,
            self._peers.last_call(lease.release),
        ):
            if not self.is_remote:
                with storage_errors(self.path):
                    delete_temporaries(self.path, lambda name: name != REPORT_FILE)  # `report` may be at work
                yield Owned(lease, lambda: None, lease.check_now)
                return
            fetched = fetch(self.location, RUN_FILES, self.path)
            with Mirror(self.path, ObjectStore(self.location), lease.check_now, fetched) as mirror:
                yield Owned(lease, mirror.sync, lease.check)

    def require_shared(self) -> None:
        """Raises ConfigError in a process that does not see the files which process 0 writes into the directory."""
        peers = self._peers
        if peers.count == 1 or self.is_remote:
            return
        name = f".shared.{os.getpid():08d}.tmp"  # as a temporary file that the next start sweeps after a kill
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

    def check(self, run: Run, data: Dataset, *, accept_change: bool = False) -> list[Difference]:
        """Raises ConfigError if the run in the directory has another config, other data or another `init`.

        With `accept_change` it may have another config, and other data if the config names its version; the fields that
        change the numbers are returned.
        """
        record = self.existing_record()
        changes = self._changes(run, record)
        if changes and not accept_change:
            first = changes[0]
            more = f" and {len(changes) - 1} more" if len(changes) > 1 else ""
            raise ConfigError(
                f"{self.location}: holds a run of another config: {first.path} is {first.left} there and "
                f"{first.right} here{more}; use name=ANOTHER, with init={self.location} to start from its parameters, "
                "change it back, or go on with other numbers by --accept-change"
            )
        if (known := record.get("data", data.fingerprint)) != data.fingerprint:
            is_named = any(value for path, value in leaves(run.data).items() if path.rpartition(".")[2] == "version")
            if not (accept_change and is_named):
                raise ConfigError(
                    f"{self.location}: has started on data with fingerprint {known}, {data.name} has "
                    f"{data.fingerprint}; use name=ANOTHER, or the version that it has started on, or go on with this "
                    "one by data.version=FINGERPRINT --accept-change"
                )
            changes = [*changes, Difference(path="data", left=known, right=data.fingerprint)]
        started_from = record.get("init")
        if not _same_init(started_from, run.init):
            before = "none" if started_from is None else f"{started_from['run']}@{started_from['step']}"
            raise ConfigError(
                f"{self.location}: has started with init={before}, and init={run.init or 'none'} here; use "
                f"name=ANOTHER, or init={before}"
            )
        return changes

    def summary(self) -> dict[str, Any]:
        """Returns the contents of summary.json; {} without it, or, with a warning, if it is damaged."""
        summary = self.path / SUMMARY_FILE
        try:
            return read_summary(summary) if summary.exists() else {}
        except StorageError as error:
            _log.warning("%s", error)
            return {}

    def _changes(self, run: Run, record: Mapping[str, Any]) -> list[Difference]:
        """Returns the fingerprinted fields in which a run record differs from a config."""
        recorded = decode_record(self.record, record, ClassFinder.from_config(run))
        if isinstance(recorded, Run) and record.get("decisions"):  # the config has what they left out, too
            skip_batches = tuple((start, stop) for start, stop in record["skip_batches"])
            recorded = replace(recorded, train=replace(recorded.train, skip_batches=skip_batches))
        return diff(recorded, run, fingerprinted_only=True)


class Owned(NamedTuple):
    """A run directory that this process owns."""

    lease: Lease
    sync: Callable[[], None]  # copies the small files into the bucket now, if the directory is there
    # Raises RunInUseError if the small files may be written no longer, or those of a bucket may not be copied into it.
    check: Callable[[], None]

    def secure(self) -> None:
        """Raises RunInUseError if another start has the run now, and copies the small files into the bucket."""
        self.lease.check_now()
        self.sync()


def join_location(root: str, name: str) -> str:
    """Returns the path or URL of a run's directory."""
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else str(Path(root, name).expanduser())


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
