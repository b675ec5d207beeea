"""Steps on storage, written and read by Orbax: the only module that knows Orbax.

Not for deciding when to save, nor for turning failures into messages: exceptions of Orbax, TensorStore and
the operating system pass through. Import it late: importing Orbax takes a while and, through absl, gives a
root logger that has no handler one, so logging should be set up before.

The stable part of Orbax is used: `CheckpointManager` with one named item for the state and one for the record
(its v1 interface is declared experimental). A step is written to a temporary directory which is renamed when
everything is in it, so a step directory is always a whole step.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from jaxinfra.checkpoint.leaves import leaf_types

_STATE = "state"
_RECORD = "record"


class OrbaxBackend:
    """The steps in one directory.

    Opened for writing, it sweeps what half-written steps left behind, so a directory has one writer. It keeps the
    `keep_last` newest steps, and those divisible by `keep_every`.
    """

    def __init__(self, directory: epath.Path, *, keep_last: int, keep_every: int | None, read_only: bool) -> None:
        self._directory = directory
        self._read_only = read_only
        self._format = ocp.path.step.standard_name_format()
        self._keep: list[ocp.checkpoint_managers.PreservationPolicy] = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every is not None:
            self._keep.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._quiet = _Raised()
        logging.getLogger("absl").addFilter(self._quiet)
        self._opened: ocp.CheckpointManager | None = self._open()

    def all_steps(self) -> list[int]:
        """The whole steps on storage, ascending; never the one being written."""
        # Read from storage: the manager's own list holds the step that is still being written.
        return sorted(found.step for found in self._format.find_all(self._directory))

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Starts to write a step; returns when the arrays may be changed or donated.

        On an accelerator that is after their copy to the host. On CPU the writer holds a view of each array,
        and JAX does not reuse a buffer that is viewed: a donated one lives until it is written.
        """
        items = ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(state), _RECORD: ocp.args.JsonSave(record)})
        # A save is meant to move arrays to the host, whatever guard the training loop runs under.
        with jax.transfer_guard("allow"):
            self._manager.save(step, args=items, force=True)

    def is_saving(self) -> bool:
        """Whether a step is being written."""
        return self._opened is not None and self._opened.is_saving_in_progress()

    def wait_until_finished(self) -> None:
        """Waits until the step being written, if any, is whole and old steps are deleted."""
        if self._opened is not None:
            self._opened.wait_until_finished()

    def leaf_types(self, step: int) -> dict[str, str]:
        """The types of the leaves of a step's state by name."""
        items = self._manager.metadata(step).item_metadata or {}
        if (metadata := items.get(_STATE)) is None:
            raise FileNotFoundError(f"it has no readable {_STATE}")
        return leaf_types(metadata.tree)

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
        """The state of a step, or with `partial` a part of it, as the `jax.ShapeDtypeStruct`s say."""
        places = jax.tree.map(
            lambda leaf: ocp.ArrayRestoreArgs(
                restore_type=jax.Array, sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            ),
            abstract,
        )
        args = ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=partial)
        with jax.transfer_guard("allow"):
            return self._manager.restore(step, args=ocp.args.Composite(**{_STATE: args}))[_STATE]

    def load_record(self, step: int) -> dict[str, Any]:
        """The record saved with a step."""
        args = ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=args)[_RECORD]

    def reset(self) -> None:
        """Ends the manager after a failure; the next use opens a new one.

        The failed one has lost sight of the old steps that it meant to delete, and its half-written step
        fills the disk until the new one sweeps it.
        """
        manager, self._opened = self._opened, None
        if manager is not None:
            manager.close()

    def close(self) -> None:
        """Waits for what is being written and ends the threads; further use is an error."""
        try:
            self.reset()
        finally:
            logging.getLogger("absl").removeFilter(self._quiet)

    @property
    def _manager(self) -> ocp.CheckpointManager:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only and jax.process_index() == 0:
            _sweep(self._directory)
        # Registered handlers let a manager that has saved nothing yet read what another one saved.
        registry, args = ocp.handlers.DefaultCheckpointHandlerRegistry(), ocp.args
        for name, handler, kinds in (
            (_STATE, ocp.PyTreeCheckpointHandler(), (args.PyTreeSave, args.PyTreeRestore)),
            (_RECORD, ocp.JsonCheckpointHandler(), (args.JsonSave, args.JsonRestore)),
        ):
            for kind in kinds:
                registry.add(name, kind, handler)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(self._keep),
            create=not self._read_only,
            step_name_format=self._format,
            # A directory that cannot be made then fails at once. Made in the background, its failure leaves
            # threads that wait minutes for it and keep the process from ending.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        return ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)


def _sweep(directory: epath.Path) -> None:
    """Deletes half-written steps.

    Orbax can do it too, but in a thread that nothing waits for unless a save follows.
    """
    for path in directory.iterdir():
        # Only what is named like a step: on an object store any directory without a commit file would do.
        if path.name.split(".")[0].isdigit() and ocp.utils.is_tmp_checkpoint(path):
            path.rmtree()


class _Raised(logging.Filter):
    """Drops Orbax's progress notes, its advice, and the tracebacks of exceptions that it raises as well.

    An error without an exception passes: nobody else would tell of it.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """False for a record that is not to be shown."""
        told_elsewhere = record.levelno < logging.ERROR or bool(record.exc_info)
        return not (told_elsewhere and "orbax" in Path(record.pathname).parts)
