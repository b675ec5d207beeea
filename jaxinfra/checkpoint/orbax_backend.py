"""Reads and writes checkpoints with Orbax; the only module that imports it.

Exceptions of Orbax, TensorStore and the operating system pass through. A step has two items, the state and the run
record. Orbax writes a step to a temporary directory and renames it at the end, so a directory with a step's name is
always complete. Its v1 API is experimental, so this uses the older `CheckpointManager`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, EveryNSteps, LatestN, PreservationPolicy

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import PyTree, leaf_types
from jaxinfra.storage.lease import Lease

_STATE = "state"
_RECORD = "record"
_DELETED = ".deleted-"


class OrbaxBackend:
    """The checkpoints in one directory; the arguments and methods are those of our own `CheckpointManager`."""

    def __init__(
        self, directory: epath.Path, config: CheckpointConfig, *, read_only: bool, lease: Lease | None = None
    ) -> None:
        self._directory = directory
        self._read_only = read_only
        self._temporary_path = _temporary_path(lease)
        self._format = ocp.path.step.standard_name_format()
        self._keep: list[PreservationPolicy] = [LatestN(config.keep_last)]
        if config.keep_every is not None:
            self._keep.append(EveryNSteps(config.keep_every))
        self._log_filter = _OrbaxLogFilter()
        logging.getLogger("absl").addFilter(self._log_filter)
        self._opened: ocp.CheckpointManager | None = self._open()  # None after a failure

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        # Orbax's own list includes the step that is being written.
        return sorted(found.step for found in self._format.find_all(self._directory))

    def save(self, step: int, state: PyTree, record: Mapping[str, object]) -> None:
        """Starts to write a step; returns when the arrays may be changed or donated."""
        # By then arrays of an accelerator are copied to the host. On CPU the writer holds a view of each array, and JAX
        # does not reuse a buffer while a view of it exists.
        items = ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(state), _RECORD: ocp.args.JsonSave(record)})
        # A save has to move arrays to the host, even if the training loop forbids transfers.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=items, force=True)

    def is_saving(self) -> bool:
        """Returns whether a step is being written."""
        return self._opened is not None and self._opened.is_saving_in_progress()

    def wait_until_finished(self) -> None:
        """Waits until the step being written, if any, is complete and old steps are deleted."""
        if self._opened is not None:
            self._opened.wait_until_finished()

    def leaf_types(self, step: int) -> dict[str, str]:
        """Returns the type of each leaf of a step's state by name."""
        items = self._manager.metadata(step).item_metadata or {}
        if (metadata := items.get(_STATE)) is None:
            raise FileNotFoundError(f"it has no readable {_STATE}")
        return leaf_types(metadata.tree)

    def restore[T](self, step: int, abstract: T, *, partial: bool = False) -> T:
        """Restores the state of a step, or with `partial` a part of it; `abstract` has `jax.ShapeDtypeStruct`s."""
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=partial)
        with jax.transfer_guard("allow"):
            return self._manager.restore(step, args=ocp.args.Composite(**{_STATE: args}))[_STATE]

    def load_record(self, step: int) -> dict[str, Any]:
        """Loads the record saved with a step."""
        args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=args)[_RECORD]

    def reset(self) -> None:
        """Closes Orbax's manager after a failure; the next use opens a new one."""
        # The failed manager forgets the old steps that it meant to delete, and leaves its incomplete step on the disk.
        manager, self._opened = self._opened, None
        if manager is not None:
            manager.close()

    def close(self) -> None:
        """Waits for the step being written and ends Orbax's threads."""
        try:
            self.reset()
        finally:
            logging.getLogger("absl").removeFilter(self._log_filter)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only and jax.process_index() == 0:
            _delete_incomplete_steps(self._directory)
        # A writer is one of all processes. A reader is alone: Orbax does not wait for others.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="reader"
        )
        processes = alone if self._read_only else ocp.options.MultiprocessingOptions()
        # Registered handlers let a manager that has saved nothing yet read what another one saved.
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        state_handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=processes)
        record_handler = ocp.JsonCheckpointHandler(multiprocessing_options=processes)
        registry.add(_STATE, ocp.args.PyTreeSave, state_handler)
        registry.add(_STATE, ocp.args.PyTreeRestore, state_handler)
        registry.add(_RECORD, ocp.args.JsonSave, record_handler)
        registry.add(_RECORD, ocp.args.JsonRestore, record_handler)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(self._keep),
            create=not self._read_only,
            multiprocessing_options=processes,
            step_name_format=self._format,
            temporary_path_class=self._temporary_path,
            # If a directory cannot be created, this fails at once. In the background, the failure would leave threads
            # that wait for the directory for minutes and keep the process from ending.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)


def _temporary_path(lease: Lease | None) -> type[AtomicRenameTemporaryPath]:
    """Returns the class of Orbax's temporary directories, which only the owner of the lease may rename to a step.

    The rename of an owner that loses its lease after the check fails, too: the new owner has renamed the directory.
    """

    class OwnedTemporaryPath(AtomicRenameTemporaryPath):
        @override
        async def finalize(self) -> None:
            if lease is not None:
                lease.check_now()
            await super().finalize()

    return OwnedTemporaryPath


def _delete_incomplete_steps(directory: epath.Path) -> None:
    """Deletes incomplete steps. Orbax does so, too, but in a thread that may not finish if no save follows."""
    for path in directory.iterdir():
        is_deleted = path.name.startswith(_DELETED)
        if not is_deleted and path.name.split(".")[0].isdigit() and ocp.utils.is_tmp_checkpoint(path):
            # Renamed first: an owner that was stopped, and has lost its lease, cannot complete the step any more.
            path = path.rename(directory / f"{_DELETED}{path.name}")
            is_deleted = True
        if is_deleted:
            path.rmtree()


class _OrbaxLogFilter(logging.Filter):
    """Drops what Orbax logs below ERROR, and errors with a traceback, whose exceptions it also raises.

    An error without an exception passes: nothing else reports it.
    """

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        redundant = record.levelno < logging.ERROR or bool(record.exc_info)
        return not (redundant and "orbax" in Path(record.pathname).parts)
