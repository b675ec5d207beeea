"""Copies a checkpoint into another directory or bucket, and verifies the copy.

From disk to disk the files are copied, without JAX. Else the arrays are read, and saved as a run would save them; that
takes host memory for the whole state.
"""

import json
import os
import shutil
from pathlib import Path

from jaxinfra.checkpoint import disk_steps
from jaxinfra.checkpoint.bucket_index import owner_token
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.difference import Checkpoint
from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.checkpoint.inventory import stored_checkpoints, verify_step
from jaxinfra.checkpoint.manifest import DamageError, verify_files
from jaxinfra.checkpoint.step_store import StepStore
from jaxinfra.config.source import RECORD_FILE
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage.atomic import move_folder
from jaxinfra.storage.checks import check_space, make_writable
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.lease import Lease, hold
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore

_KEEP_ALL = CheckpointConfig(save_every=1, keep_last=1_000_000_000, async_save=False)


def copy_run(run: str, source: Checkpoint, target: str) -> None:
    """Makes `target` a run directory with the record of `run` and this verified checkpoint of it.

    Holds the lease of the target meanwhile. The checkpoint is listed once it is complete. Raises ConfigError if the
    target has the step, holds another run, or is no run; StorageError if it cannot be written or does not hold what was
    written.
    """
    record = ObjectStore(run).read_or_none(RECORD_FILE) or json.dumps(source.manifest.record, indent=1).encode()
    stored, place = stored_checkpoints(target), ObjectStore(target)
    _check_target(target, place.read_or_none(RECORD_FILE), record)
    if source.step in stored.steps():
        raise ConfigError(
            f"{stored.location}/{source.step}: exists, and a checkpoint is never overwritten; use --step or another DIR"
        )
    with hold(target, after=owner_token(stored.location) if is_remote(target) else 0) as lease:
        if place.read_or_none(RECORD_FILE) is None:
            place.write(RECORD_FILE, record)
        if isinstance(source.stored, DiskSteps) and isinstance(stored, DiskSteps):
            _copy_files(source, source.stored.folder(source.step), stored, lease)
        else:
            _copy_arrays(source, stored, lease)


def _check_target(target: str, existing: bytes | None, record: bytes) -> None:
    """Raises ConfigError unless the target is new, or holds the same run."""
    if existing is not None and _fingerprint(target, existing) != _fingerprint(target, record):
        raise ConfigError(f"{target}: holds a run of another config; name another DIR")
    if existing is None and not is_remote(target) and os.path.exists(target):
        if not os.path.isdir(target):
            raise ConfigError(f"{target}: is a file; name a folder")
        if {*os.listdir(target)} - {"lease"}:
            raise ConfigError(f"{target}: is not empty, and no run; name another DIR")


def _fingerprint(where: str, record: bytes) -> object:
    try:
        return json.loads(record).get("fingerprint")
    except (ValueError, AttributeError):
        raise ConfigError(f"{where}: {RECORD_FILE} is damaged; restore it, or name another DIR") from None


def _copy_files(source: Checkpoint, origin: Path, target: DiskSteps, lease: Lease) -> None:
    """Copies the files of the manifest into a temporary folder, verifies them, and renames the folder."""
    make_writable(target.directory)
    purpose = f"the checkpoint of step {source.step}"
    check_space(target.directory, source.manifest.num_bytes, purpose=purpose, fix="name another DIR")
    temporary = target.directory / f"{source.step}{disk_steps.TEMPORARY}-copy"
    with storage_errors(temporary):
        if temporary.exists():
            disk_steps.delete(temporary)
        shutil.copytree(origin, temporary, copy_function=shutil.copyfile)
        try:
            verify_files(temporary, source.manifest, source.manifest.files)
        except DamageError as damage:
            raise StorageError(f"{temporary}: does not hold what was just written: {damage}; check the disk") from None
        lease.check_now()
        if not move_folder(temporary, target.folder(source.step)):
            raise ConfigError(f"{target.folder(source.step)}: exists; use --step or another DIR")


def _copy_arrays(source: Checkpoint, target: StepStore, lease: Lease) -> None:
    """Saves the arrays as a run would; a bucket is read back before it lists the step, a disk afterwards."""
    import jax  # imported late: a copy from disk to disk needs none of it

    from jaxinfra.checkpoint.manager import CheckpointManager
    from jaxinfra.parallel.spec import nested

    step, manifest, cpu = source.step, source.manifest, jax.devices("cpu")[0]
    leaves = {name: jax.device_put(source.stored.read_leaf(step, manifest, name), cpu) for name in manifest.leaves}
    with CheckpointManager(target.location, _KEEP_ALL, lease=lease) as checkpoints:
        checkpoints.save(step, nested(leaves), manifest.record, metrics=manifest.metrics, force=True)
    if problems := verify_step(target, step).problems:
        target.delete([step], [], lease)
        raise StorageError(f"{target.location}/{step}: does not hold what was just written: {problems[0]}")
