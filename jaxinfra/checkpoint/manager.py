"""Saves, lists, verifies and restores the checkpoints of a run.

A checkpoint is complete once its manifest is there (`manifest`). An older one is deleted only after a newer one is
complete. A restored array is bit-equal to the saved one, on any mesh: every byte is compared with its hash.
The position in the data is not saved: it follows from the seed and the step.
"""

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast, override

import jax

from jaxinfra.checkpoint.bucket_saver import BucketSaver
from jaxinfra.checkpoint.bucket_steps import BucketSteps
from jaxinfra.checkpoint.config import CheckpointConfig, Metrics
from jaxinfra.checkpoint.disk_steps import DiskSteps
from jaxinfra.checkpoint.leaves import PyTree, first_difference, leaf_types, tree_bytes
from jaxinfra.checkpoint.manifest import DamageError, Manifest
from jaxinfra.checkpoint.saver import Gather, Saver
from jaxinfra.checkpoint.step_store import StepStore
from jaxinfra.errors import CheckpointError, ConfigError, JaxinfraError, StorageError
from jaxinfra.storage.checks import make_writable
from jaxinfra.storage.closing import ClosedOnExit
from jaxinfra.storage.errors import cause_of, is_storage_error, storage_errors
from jaxinfra.storage.lease import Lease
from jaxinfra.storage.location import is_remote

_log = logging.getLogger(__name__)


class CheckpointManager(ClosedOnExit):
    """The checkpoints in one directory: for each step, the train state and the run record.

    The directory is a local path, which Orbax reads and writes, or an `s3://` or `gs://` URL; it is created if it is
    missing. Only one manager at a time may write to it; it deletes incomplete checkpoints when it opens. Any number of
    `read_only` managers may read. With several processes, all of them make the same calls; a local directory must be
    shared by them. Use it as a context manager, or call `close`.

    Args:
        directory: of the checkpoints.
        config: when to save and which to keep.
        read_only: whether to leave everything as it is.
        lease: of the run, in process 0; a manager whose lease is lost cannot complete a checkpoint.
        gather: exchanges values between the processes that make the same calls, also in the background.
        before_commit: is called in process 0 before a checkpoint of a URL is complete.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        read_only: bool = False,
        lease: Lease | None = None,
        gather: Gather = lambda value: [value],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._is_remote = is_remote(directory)
        self.directory = os.fspath(directory) if self._is_remote else os.path.abspath(directory)
        self.config = config or CheckpointConfig()
        self._read_only = read_only
        self._gather = gather
        self._saving_step: int | None = None  # the step that is being written in the background
        self._saved_step: int | None = None  # the last one; other hosts may see its directory later
        self.complete_step: int | None = None
        """The last one that this process has waited for, and that is complete."""
        if self._is_remote:
            bucket = BucketSteps(self.directory)
            self._store: StepStore = bucket
            self._saver: Saver = BucketSaver(
                bucket, self.config, read_only=read_only, lease=lease, gather=gather, before_commit=before_commit
            )
            return
        if not read_only:
            make_writable(self.directory)
        # Imported late: Orbax imports slowly, and its import of absl adds a handler to a root logger that has none.
        from jaxinfra.checkpoint.disk_saver import DiskSaver

        self._store = disk = DiskSteps(Path(self.directory))
        with storage_errors(self.directory):
            self._saver = DiskSaver(disk, self.config, read_only=read_only, lease=lease, gather=gather)

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending; damaged ones too, until somebody has tried to read them."""
        return self._store.steps()

    def needed_bytes(self, abstract_state: PyTree) -> int:
        """Returns the bytes that must be free for the next saves, without what `keep_every` keeps in addition."""
        # `keep_last` checkpoints and the one that is being written, minus those that exist.
        num_checkpoints = max(1, self.config.keep_last + 1 - len(self.all_steps()))
        return num_checkpoints * tree_bytes(abstract_state)

    def save(
        self,
        step: int,
        state: PyTree,
        record: Mapping[str, object],
        *,
        metrics: Metrics | None = None,
        force: bool = False,
    ) -> bool:
        """Saves a tree of `jax.Array` and a record (as JSON); returns whether it did.

        `metrics` are those of an evaluation after this step, for `keep_best`.

        It saves if `step`, the number of completed steps, is a multiple of `save_every`, or with `force`, which
        `save_every=auto` always needs; but no step twice. It waits for the previous save, then returns as soon as the
        arrays may be changed or donated; writing continues in the background. Raises StorageError if the previous save
        failed (this one has then not started: call again) or if this one cannot start; older checkpoints are intact.
        """
        assert not self._read_only, "opened with read_only=True"
        is_due = force or self.config.due_after(step) == "checkpoint"
        # If a background save has failed, the next call raises its error, even if no save is due. With several
        # processes, which may see it after different steps, all raise it at the next save.
        if is_due or (jax.process_count() == 1 and not self._saver.is_saving()):
            self.wait_until_finished()
        if not is_due or step == self._saved_step or step in self.all_steps():
            return False
        record = json.loads(json.dumps(record))  # fails now, not in the background, and is safe from later changes
        with self._saving(step):
            self._saver.save(step, state, record, dict(metrics or {}))
        self._saving_step = self._saved_step = step
        if not self.config.async_save:
            self.wait_until_finished()
        return True

    def restore[T](self, step: int, abstract_state: T) -> T:
        """Restores the state of `step`, on any mesh, as a tree of `jax.ShapeDtypeStruct` with shardings describes it.

        Every byte is compared with the hash in the manifest; several processes share that work. Raises CheckpointError
        if there is no such step or it is damaged, and ConfigError if the saved state is of another model or optimizer;
        it names the first leaf that differs.
        """

        def read() -> T:
            self._check_leaves(step, self._manifest(step).leaves, abstract_state)
            return self._saver.restore(step, abstract_state)

        return self._read(step, read)

    def restore_params[T](
        self, step: int, abstract_params: T, *, subtree: str = "params", optional: str | None = None
    ) -> T:
        """Restores "params" or "ema" (the averaged parameters) without reading the rest of the state.

        The checkpoint may have parameters below the path `optional` that are not wanted. Raises the errors of
        `restore`, and ConfigError if the checkpoint has no such subtree.
        """

        def read() -> T:
            types = self._manifest(step).leaves
            saved = {name: leaf_type for name, leaf_type in types.items() if name.split(".")[0] == subtree}
            if not saved:
                subtrees = ", ".join(dict.fromkeys(name.split(".")[0] for name in types))
                raise ConfigError(f"{self._path(step)}: has no {subtree}; it has {subtrees}")
            wanted = {subtree: abstract_params}
            known, unread = leaf_types(wanted), f"{subtree}.{optional}."
            saved = {name: kind for name, kind in saved.items() if name in known or not name.startswith(unread)}
            self._check_leaves(step, saved, wanted)
            return self._saver.restore(step, wanted)[subtree]

        return self._read(step, read)

    def newest[T](self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """Reads the newest intact checkpoint; returns its step and the result, None if there are no checkpoints.

        `read` gets a step, and calls a method of this manager. If that raises CheckpointError, the next older step is
        read. Damaged steps are named in a warning. A writer then renames them, but only if an older step is intact:
        a run whose checkpoints are all damaged must not begin anew without a word. Then CheckpointError lists them.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self._gather(self.all_steps())[0]):
            try:
                result = read(step)
            except CheckpointError as error:
                damaged[step] = str(error.__cause__ or error)
                continue
            for each, reason in damaged.items():
                self._set_aside(each, reason, step)
            return step, result
        if damaged:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"{self.directory}: no checkpoint is intact: {reasons}; restore one from a copy, or use name=ANOTHER "
                "to begin at step 0"
            )
        return None

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step, whose files are there; raises CheckpointError if it is missing or damaged."""
        return self._read(step, lambda: self._manifest(step))

    def wait_until_finished(self) -> None:
        """Waits for the save in progress, if any; raises StorageError if it failed."""
        step, self._saving_step = self._saving_step, None
        with self._saving(step):
            self._saver.wait_until_finished()
        if step is not None:
            self.complete_step = step

    @override
    def close(self) -> None:
        """Waits for the save in progress, as `wait_until_finished`, and ends its threads."""
        try:
            self.wait_until_finished()
        finally:
            self._saver.close()

    @contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        """Turns a storage failure into a StorageError, and resets Orbax so that the next save can succeed."""
        try:
            yield
        except Exception as error:
            self._saver.reset()
            self._saved_step = None
            if not is_storage_error(error):
                raise
            steps = self.all_steps()
            action = "deleting older steps" if step in steps else "saving"  # a listed step is complete
            raise StorageError(
                f"{self._path(step)}: {action} failed: {self._describe(error)}; intact: {_join(steps)}; "
                "free space or restore access there"
            ) from error

    def _describe(self, error: Exception) -> str:
        """Returns the cause of a failure, for a full disk with the bytes that are free."""
        cause, folder = cause_of(error), Path(self.directory)
        is_full = cause in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)) and folder.is_dir()
        return f"{cause} ({shutil.disk_usage(folder).free:,} bytes free)" if is_full else cause

    def _manifest(self, step: int) -> Manifest:
        """Returns the manifest of a step, and looks for its files on a disk; a bucket takes a request for each."""
        manifest = self._store.manifest(step)
        if not self._is_remote and (missing := self._store.missing(step, manifest)):
            raise DamageError(missing[0])
        return manifest

    def _read[T](self, step: int, read: Callable[[], T]) -> T:
        """Returns what `read` returns; raises CheckpointError, in all processes, if the step cannot be read in one."""
        steps = self.all_steps()
        if step not in steps:
            raise CheckpointError(f"{self._path(step)}: does not exist; existing steps: {_join(steps)}")
        result, cause = None, None
        try:
            result = read()
        except (JaxinfraError, jax.errors.JaxRuntimeError):
            raise  # JaxRuntimeError comes from the devices, such as too little memory, not from the checkpoint
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                where = f"{self._path(step)}: cannot be read"
                raise StorageError(f"{where}: {cause_of(error)}; restore access there") from error
            cause = error
        problem = None if cause is None else cause_of(cause)
        for each in self._gather(problem):
            if each is not None:
                others = _join([other for other in steps if other != step])
                raise CheckpointError(
                    f"{self._path(step)}: cannot be read: {each}; other steps: {others}"
                ) from DamageError(each)
        return cast(T, result)

    def _set_aside(self, step: int, reason: str, older: int) -> None:
        """Warns of a damaged step in process 0, and renames it."""
        if jax.process_index() == 0:
            moved = ""
            if not self._read_only:
                with storage_errors(self._path(step)):
                    moved = f", moved to {self._saver.set_aside(step)}"
            _log.warning("%s: damaged: %s%s; going on with step %d", self._path(step), reason, moved, older)

    def _check_leaves(self, step: int, saved: Mapping[str, str], wanted: PyTree) -> None:
        if difference := first_difference(saved, leaf_types(wanted)):
            fix = "use the config that it was saved with, or another directory"
            raise ConfigError(f"{self._path(step)}: {difference}; {fix}")

    def _path(self, step: int | None) -> str:
        return f"checkpoint {self.directory}/{step}"


def _join(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
