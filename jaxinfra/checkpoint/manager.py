"""Saves, lists and restores the checkpoints of a run.

A listed checkpoint is complete. An older one is deleted only after a newer one is complete. A restored array is
bit-equal to the saved one, on any mesh. The position in the data is not saved: it follows from the seed and the step.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, override

import jax
from etils import epath

from jaxinfra.checkpoint.bucket_backend import BucketBackend, Gather
from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import PyTree, first_difference, leaf_types, tree_bytes
from jaxinfra.errors import CheckpointError, ConfigError, JaxinfraError, StorageError
from jaxinfra.storage.checks import make_writable
from jaxinfra.storage.closing import ClosedOnExit
from jaxinfra.storage.errors import cause_of, is_storage_error, storage_errors
from jaxinfra.storage.lease import Lease
from jaxinfra.storage.location import is_remote


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
        gather: exchanges values between the processes in the background; needed for URLs only.
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
        self._saving_step: int | None = None  # the step that is being written in the background
        self._saved_step: int | None = None  # the last one; other hosts may see its directory later
        if self._is_remote:
            self._backend = BucketBackend(
                self.directory,
                self.config,
                read_only=read_only,
                lease=lease,
                gather=gather,
                before_commit=before_commit,
            )
            return
        if not read_only:
            make_writable(self.directory)
        # Imported late: Orbax imports slowly, and its import of absl adds a handler to a root logger that has none.
        from jaxinfra.checkpoint.orbax_backend import OrbaxBackend

        with storage_errors(self.directory):
            self._backend = OrbaxBackend(epath.Path(self.directory), self.config, read_only=read_only, lease=lease)

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        return self._backend.all_steps()

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None if there is none."""
        return max(self.all_steps(), default=None)

    def needed_bytes(self, abstract_state: PyTree) -> int:
        """Returns the bytes that must be free for the next saves, without what `keep_every` keeps in addition."""
        # `keep_last` checkpoints and the one that is being written, minus those that exist.
        num_checkpoints = max(1, self.config.keep_last + 1 - len(self.all_steps()))
        return num_checkpoints * tree_bytes(abstract_state)

    def save(self, step: int, state: PyTree, record: Mapping[str, object], *, force: bool = False) -> bool:
        """Saves a tree of `jax.Array` and a record (as JSON); returns whether it did.

        It saves if `step`, the number of completed steps, is a multiple of `save_every`, or with `force`; but no step
        twice. It waits for the previous save, then returns as soon as the arrays may be changed or donated; writing
        continues in the background. Raises StorageError if the previous save failed (this one has then not started:
        call again) or if this one cannot start; older checkpoints are intact.
        """
        assert not self._read_only, "opened with read_only=True"
        is_due = force or step % self.config.save_every == 0
        # If a background save has failed, the next call raises its error, even if no save is due. With several
        # processes, which may see it after different steps, all raise it at the next save.
        if is_due or (jax.process_count() == 1 and not self._backend.is_saving()):
            self.wait_until_finished()
        if not is_due or step == self._saved_step or step in self.all_steps():
            return False
        record = json.loads(json.dumps(record))  # fails now, not in the background, and is safe from later changes
        with self._saving(step):
            self._backend.save(step, state, record)
        self._saving_step = self._saved_step = step
        if not self.config.async_save:
            self.wait_until_finished()
        return True

    def restore[T](self, step: int, abstract_state: T) -> T:
        """Restores the state of `step`, on any mesh, as a tree of `jax.ShapeDtypeStruct` with shardings describes it.

        Raises CheckpointError if there is no such step or it cannot be read, and ConfigError if the saved state is of
        another model or optimizer; it names the first leaf that differs.
        """
        with self._reading(step):
            self._check_leaves(step, self._backend.leaf_types(step), abstract_state)
            return self._backend.restore(step, abstract_state)

    def restore_params[T](self, step: int, abstract_params: T, *, subtree: str = "params") -> T:
        """Restores "params" or "ema" (the averaged parameters) without reading the rest of the state.

        Raises the errors of `restore`, and ConfigError if the checkpoint has no such subtree.
        """
        with self._reading(step):
            types = self._backend.leaf_types(step)
            saved = {name: leaf_type for name, leaf_type in types.items() if name.split(".")[0] == subtree}
            if not saved:
                subtrees = ", ".join(dict.fromkeys(name.split(".")[0] for name in types))
                raise ConfigError(f"{self._path(step)}: has no {subtree}; it has {subtrees}")
            wanted = {subtree: abstract_params}
            self._check_leaves(step, saved, wanted)
            return self._backend.restore(step, wanted, partial=True)[subtree]

    def load_record(self, step: int) -> dict[str, Any]:
        """Loads the record saved with `step`; raises CheckpointError if it cannot be read."""
        with self._reading(step):
            return self._backend.load_record(step)

    def wait_until_finished(self) -> None:
        """Waits for the save in progress, if any; raises StorageError if it failed."""
        step, self._saving_step = self._saving_step, None
        with self._saving(step):
            self._backend.wait_until_finished()

    @override
    def close(self) -> None:
        """Waits for the save in progress, as `wait_until_finished`, and ends its threads."""
        try:
            self.wait_until_finished()
        finally:
            self._backend.close()

    @contextmanager
    def _saving(self, step: int | None) -> Iterator[None]:
        """Turns a storage failure into a StorageError, and resets Orbax so that the next save can succeed."""
        try:
            yield
        except Exception as error:
            self._backend.reset()
            self._saved_step = None
            if not is_storage_error(error) and not isinstance(error, StorageError):
                raise
            steps = self.all_steps()
            action = "deleting older steps" if step in steps else "saving"  # a listed step is complete
            raise StorageError(
                f"{self._path(step)}: {action} failed: {cause_of(error)}; intact: {_join(steps)}; "
                "free space or restore access there"
            ) from error

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Raises CheckpointError if the step does not exist or cannot be read."""
        steps = self.all_steps()
        if step not in steps:
            raise CheckpointError(f"{self._path(step)}: does not exist; existing steps: {_join(steps)}")
        try:
            yield
        except (JaxinfraError, jax.errors.JaxRuntimeError):
            raise  # JaxRuntimeError comes from the devices, such as too little memory, not from the checkpoint
        except Exception as error:
            others = _join([other for other in steps if other != step])
            raise CheckpointError(
                f"{self._path(step)}: cannot be read: {cause_of(error)}; other steps: {others}"
            ) from error

    def _check_leaves(self, step: int, saved: dict[str, str], wanted: PyTree) -> None:
        if difference := first_difference(saved, leaf_types(wanted)):
            fix = "use the config that it was saved with, or another directory"
            raise ConfigError(f"{self._path(step)}: {difference}; {fix}")

    def _path(self, step: int | None) -> str:
        return f"checkpoint {self.directory}/{step}"


def _join(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
