"""The checkpoints of a run: when to save, what to keep, and what a failure means.

Not for the format (see `orbax_store`), nor for the position in the data: a run's data follows from its seed
and its step, so the state and the record are all there is to keep.

Invariants: a step that is listed is whole; an older step is deleted only after a newer one is whole; a
restored array is bit for bit what was saved, on whatever mesh it was and is.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import jax
from etils import epath

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import first_difference, leaf_types, tree_bytes, with_concrete_shardings
from jaxinfra.errors import CheckpointError, ConfigError, JaxinfraError, StorageError
from jaxinfra.storage.checks import is_remote, make_writable
from jaxinfra.storage.errors import cause_of, is_storage_error, storage_errors


class CheckpointManager:
    """The checkpoints in one directory, each the state of a run after some step and its record.

    In a run of many processes all of them make and call it alike. The directory, a local path or `gs://...`, is made if
    it is missing; StorageError where it cannot be made or written. It has one writer at a time: making one sweeps away
    what half-written steps left behind. Any number may read: `read_only` makes, sweeps and deletes nothing.

    Use it as a context manager, or call `close`: what is still being written is finished there.
    """

    def __init__(
        self, directory: epath.PathLike, config: CheckpointConfig | None = None, *, read_only: bool = False
    ) -> None:
        self.directory = epath.Path(directory if is_remote(directory) else os.path.abspath(directory))
        self.config = config or CheckpointConfig()
        self._read_only = read_only
        self._writing: int | None = None
        if not read_only:
            make_writable(self.directory)
        # Here, not at the top: whoever only needs the config should not wait for Orbax.
        from jaxinfra.checkpoint.orbax_backend import OrbaxBackend

        last, every = self.config.keep_last, self.config.keep_every
        with storage_errors(self.directory):
            self._store = OrbaxBackend(self.directory, keep_last=last, keep_every=every, read_only=read_only)

    def all_steps(self) -> list[int]:
        """The steps that can be restored, ascending; one that is still being written is not among them."""
        return self._store.all_steps()

    def latest_step(self) -> int | None:
        """The newest step that can be restored, None if there is none."""
        return max(self.all_steps(), default=None)

    def needed_bytes(self, abstract_state: Any) -> int:
        """Bytes still to be free for a run with this state: the kept checkpoints and the one being written.

        An upper bound for `check_space` (files are compressed), but for what `keep_every` adds over time.
        """
        missing = max(1, self.config.keep_last + 1 - len(self.all_steps()))
        return missing * tree_bytes(abstract_state)

    def save(self, step: int, state: Any, record: dict[str, Any], *, force: bool = False) -> bool:
        """Saves `state` if `step` is due, and returns whether it did.

        Returns as soon as the arrays may be changed or donated; the rest happens in the background. Waits for
        the save before it, if that is still going on. A step that is there already is left as it is.

        StorageError where the save before this one failed, and this one has not begun: call again to retry. Or where
        this one failed at once. The older checkpoints are intact.

        The state is a tree of `jax.Array`, each global to all processes and of an ordinary data type, that has seen so
        many steps; the record goes with it as JSON. With `force` it is due although no multiple of `config.every`.
        """
        assert not self._read_only, "opened with read_only=True"
        due = force or step % self.config.save_every == 0
        # A failure in the background is told at the first call after it, due or not.
        if due or not self._store.is_saving():
            self.wait_until_finished()
        if not due or step in self.all_steps():
            return False
        snapshot = json.loads(json.dumps(record))  # checked now, and safe from later changes
        with self._storage_errors(step):
            self._store.save(step, state, snapshot)
        self._writing = step
        if not self.config.async_save:
            self.wait_until_finished()
        return True

    def restore[T](self, step: int, abstract_state: T) -> T:
        """The whole state of `step`, bit-equal, sharded as asked.

        Asked is a tree of `jax.ShapeDtypeStruct` with shardings, on any mesh. Those on an abstract mesh are taken to be
        on the mesh of `jax.set_mesh`; ValueError where a leaf has no usable one. CheckpointError where there is no such
        step or it cannot be read; ConfigError, with the first leaf that differs, where it is of another model or
        optimizer.
        """
        target = with_concrete_shardings(abstract_state)
        with self._reading(step):
            self._compare(step, self._store.leaf_types(step), target)
            return self._store.restore(step, target)

    def restore_params[T](self, step: int, abstract_params: T, *, subtree: str = "params") -> T:
        """One part of the state of `step`, "params" or "ema" (the averaged ones), without reading or knowing the rest.

        As `restore`, with ConfigError where the checkpoint has no such part, too.
        """
        target = with_concrete_shardings({subtree: abstract_params})
        with self._reading(step):
            saved = self._store.leaf_types(step)
            part = {name: leaf for name, leaf in saved.items() if name.split(".")[0] == subtree}
            if not part:
                parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in saved))
                raise ConfigError(f"{self._path(step)}: has no {subtree}; it has {parts}")
            self._compare(step, part, target)
            return self._store.restore(step, target, partial=True)[subtree]

    def load_record(self, step: int) -> dict[str, Any]:
        """The record saved with `step`; CheckpointError where there is no such step, or it cannot be read."""
        with self._reading(step):
            return self._store.load_record(step)

    def wait_until_finished(self) -> None:
        """Waits until the save under way, if any, is done; StorageError where it failed: older ones are intact."""
        step, self._writing = self._writing, None
        with self._storage_errors(step):
            self._store.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way, as `wait`, and ends its threads."""
        try:
            self.wait_until_finished()
        finally:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except JaxinfraError as failure:
            if error is None:
                raise
            error.add_note(str(failure))  # what ended the block matters more

    @contextmanager
    def _storage_errors(self, step: int | None) -> Iterator[None]:
        """Tells of a failed save in one line; the next one starts afresh."""
        try:
            yield
        except Exception as error:
            self._store.reset()
            if not is_storage_error(error):
                raise
            steps = self.all_steps()
            what = "deleting older steps" if step in steps else "saving"
            raise StorageError(
                f"{self._path(step)}: {what} failed: {cause_of(error)}; intact: {_listed(steps)}; "
                "mend the storage, the next save tries again"
            ) from error

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Checks that there is such a step, and tells of one that cannot be read in one line."""
        steps = self.all_steps()
        if step not in steps:
            raise CheckpointError(f"{self._path(step)}: no such step; there is: {_listed(steps)}")
        try:
            yield
        except (JaxinfraError, jax.errors.JaxRuntimeError):
            raise  # the latter is the devices' own, like too little memory for the state
        except Exception as error:
            cause, others = cause_of(error), _listed([other for other in steps if other != step])
            raise CheckpointError(f"{self._path(step)}: cannot be read: {cause}; other steps: {others}") from error

    def _compare(self, step: int, saved: dict[str, str], target: Any) -> None:
        if difference := first_difference(saved, leaf_types(target)):
            fix = "use the config that it was saved with, or another directory"
            raise ConfigError(f"{self._path(step)}: {difference}; {fix}")

    def _path(self, step: int | None) -> str:
        return f"checkpoint {self.directory / str(step)}"


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
