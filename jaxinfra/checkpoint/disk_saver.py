"""Saves checkpoints on a disk with Orbax, and restores them with TensorStore.

A step is a folder, with a folder for each part of the state ("params", "opt_state"), which Orbax can read without this
package, and the manifest. Orbax writes into a temporary folder. Each process hashes the files that it has written,
while training goes on. Then process 0 hashes those that Orbax adds, writes the manifest, and renames the folder. So a
folder with a step's name is complete.

Exceptions of Orbax, TensorStore and the operating system pass through, StorageError and DamageError.
"""

import errno
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, override

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jaxinfra.checkpoint import disk_steps
from jaxinfra.checkpoint.config import CheckpointConfig, Metrics
from jaxinfra.checkpoint.disk_steps import DiskSteps, read_context
from jaxinfra.checkpoint.leaves import (
    PyTree,
    from_shards,
    leaf_types,
    local_shards,
    pending_bytes,
    place,
    split_parts,
)
from jaxinfra.checkpoint.manifest import (
    MANIFEST_FILE,
    DamageError,
    Manifest,
    decode_hashes,
    encode_hashes,
    hash_files,
    verify_files,
)
from jaxinfra.checkpoint.pending import in_window, read_bytes
from jaxinfra.checkpoint.saver import Gather, Saver
from jaxinfra.checkpoint.step_store import step_health
from jaxinfra.errors import ConfigError
from jaxinfra.failpoints import failpoint
from jaxinfra.parallel.spec import leaf_name
from jaxinfra.patches import mend_orbax
from jaxinfra.storage.atomic import move_folder
from jaxinfra.storage.lease import Lease

_TIMEOUT_S = 10 * 365 * 24 * 3600
"""Seconds that Orbax may wait: more than any change of the clock, by which it measures. `gather` limits the wait."""
_PATTERNS = "*?[\\"
_HASHES = "hashes."  # the file of the hashes of one process, before process 0 writes the manifest


class DiskSaver(Saver):
    """Saves and restores the state of a run in one directory; the other arguments are those of `CheckpointManager`."""

    def __init__(
        self,
        store: DiskSteps,
        config: CheckpointConfig,
        *,
        read_only: bool,
        lease: Lease | None = None,
        gather: Gather = lambda value: [value],
    ) -> None:
        folder = str(store.folder(0).parent.absolute())
        if not read_only and any(char in folder for char in _PATTERNS):
            why = f"Orbax, which finds its files by patterns, does not find them below one of {' '.join(_PATTERNS)}"
            is_named = any(char in Path(folder).parent.name for char in _PATTERNS)
            raise ConfigError(f"{folder}: {why}; use another {'name' if is_named else 'root'}")
        self._store, self._config, self._lease, self._gather = store, config, lease, gather
        self._log_filter = _OrbaxLogFilter()
        logging.getLogger("absl").addFilter(self._log_filter)
        mend_orbax()
        self._writes_manifest = not read_only and jax.process_index() == 0
        self._intact: dict[int, Metrics] = {}  # of the process that deletes superseded steps
        if self._writes_manifest:
            self._delete_incomplete_steps()
            for step in store.steps():
                manifest, problems = step_health(store, step) or (None, [])
                if manifest is not None and not problems:  # a damaged one is reported where it is read
                    self._intact[step] = manifest.metrics
        self._new_manifest: partial[Manifest] | None = None  # of the step that is being written, without its files
        self._writer: _Writer | None = None

    @override
    def save(self, step: int, state: PyTree, record: Mapping[str, object], metrics: Metrics) -> None:
        # By then arrays of an accelerator are copied to the host. On CPU the writer holds a view of each array, and JAX
        # does not reuse a buffer while a view of it exists.
        if self._writer is None:
            if self._writes_manifest:
                self._delete_incomplete_steps()
            self._writer = self._open_writer()
        self._new_manifest = partial(Manifest, step=step, leaves=leaf_types(state), record=record, metrics=metrics)
        parts = split_parts(state)
        # A save has to move arrays to the host, even if the training loop forbids transfers.
        with jax.transfer_guard("allow"):
            self._writer.start(epath.Path(self._store.folder(step)), parts)

    @override
    def is_saving(self) -> bool:
        return self._writer is not None and self._writer.is_saving

    @override
    def wait_until_finished(self) -> None:
        if self._writer is not None:
            self._writer.wait_until_finished()

    @override
    def restore[T](self, step: int, abstract: T) -> T:
        self._verify_together(step, [*split_parts(abstract)])
        failpoint("restore", step)
        paths, tree = jax.tree.flatten_with_path(abstract)
        leaves = {leaf_name(path): leaf for path, leaf in paths}
        found: dict[str, list[jax.Array]] = {name: [] for name in leaves}
        targets: list[tuple[str, Sequence[Any]]] = []
        context = read_context()

        def reads() -> Iterator[tuple[Callable[[], ts.Future[np.ndarray]], int]]:
            for name, leaf in leaves.items():
                stored = self._store.open_leaf(step, name, context)
                for index, devices in local_shards(leaf):
                    targets.append((name, devices))
                    yield stored[index].read, read_bytes(stored, index)

        with jax.transfer_guard("allow"):
            # What is under way is there twice: as it is stored, and as an array.
            for number, read in enumerate(in_window(reads(), pending_bytes(abstract) * 2 // 3)):
                name, devices = targets[number]
                found[name] += place(read.result(), leaves[name], devices)
            return jax.tree.unflatten(tree, [from_shards(leaf, found[name]) for name, leaf in leaves.items()])

    @override
    def set_aside(self, step: int) -> str:
        moved = self._store.folder(step).rename(self._store.path_aside(step))
        self._intact.pop(step, None)
        return str(moved)

    @override
    def reset(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    @override
    def close(self) -> None:
        try:
            self.reset()
        finally:
            logging.getLogger("absl").removeFilter(self._log_filter)

    def _verify_together(self, step: int, parts: Sequence[str]) -> None:
        """Verifies parts of a state, each process a share of them; raises DamageError in all."""
        problem, processes = None, len(self._gather(None))
        try:
            manifest = self._store.manifest(step)
            names = [name for name in manifest.files if name.partition("/")[0] in parts]
            part = jax.process_index() if processes > 1 else 0
            verify_files(self._store.folder(step), manifest, names, part=part, of=processes)
        except DamageError as error:
            problem = str(error)
        for each in self._gather(problem):
            if each is not None:
                raise DamageError(each)

    def _delete_incomplete_steps(self) -> None:
        """Deletes what saves and deletions that were interrupted have left.

        An owner that was stopped, and has lost its lease, cannot complete such a step any more.
        """
        for path in self._store.incomplete():
            disk_steps.delete(path)

    def _open_writer(self) -> "_Writer":
        saver = self

        class OwnedTemporaryPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
            """Orbax's temporary folder, which only the owner of the lease may rename to a step."""

            @override
            async def finalize(self) -> None:
                saver._commit(Path(self.get()), Path(self.get_final()))

        return _Writer(_Handler(compress=self._config.compress), OwnedTemporaryPath, self._gather)

    def _commit(self, temporary: Path, final: Path) -> None:
        """Writes the manifest of a step and renames its folder, in process 0, in the background.

        The rename of an owner that loses its lease after the check fails, too: the new owner has renamed the folder.
        """
        assert self._new_manifest is not None
        if self._lease is not None:
            self._lease.check_now()
        failpoint("save.manifest", self._new_manifest.keywords["step"])
        hashes = {}
        for path in temporary.glob(f"{_HASHES}*"):
            hashes |= decode_hashes(path.read_bytes())
            path.unlink()
        names = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
        hashes |= hash_files(temporary, [name for name in names if name not in hashes])
        manifest = self._new_manifest(files={name: hashes[name] for name in sorted(names)})
        (temporary / MANIFEST_FILE).write_bytes(manifest.encode())
        if not move_folder(temporary, final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        self._intact[manifest.step] = manifest.metrics
        failpoint("save.delete", manifest.step)
        for step in self._config.superseded(self._intact):
            del self._intact[step]
            hidden = disk_steps.hide(self._store.folder(step))
            failpoint("save.deleting", manifest.step)
            disk_steps.delete(hidden)


class _Writer(ocp.AsyncCheckpointer):
    """Orbax's writer, which tells whether it is at work."""

    def __init__(self, handler: "_Handler", temporary_path: type, gather: Gather) -> None:
        self._parts = handler

        def barrier(*, key: str, timeout_ms: int) -> None:
            gather(key)

        super().__init__(
            handler,
            # If a directory cannot be created, this fails at once. In the background, the failure would leave threads
            # that wait for the directory for minutes and keep the process from ending.
            async_options=ocp.AsyncOptions(
                timeout_secs=_TIMEOUT_S, barrier_sync_fn=barrier, create_directories_asynchronously=False
            ),
            temporary_path_class=temporary_path,
            checkpoint_metadata_store=ocp.metadata.metadata_store(enable_write=False),  # the manifest has all of it
        )

    def start(self, folder: epath.Path, parts: Mapping[str, Any]) -> None:
        """Starts to write the parts of a state."""
        try:
            self.save(folder, args=_SaveArgs(int(folder.name), parts))
        except BaseException:
            self._parts.start_writing()  # nothing waits for these threads, which would wait for ever
            raise

    @property
    def is_saving(self) -> bool:
        thread = self._async_manager._thread
        return thread is not None and thread.is_alive()


class _Handler(ocp.AsyncCheckpointHandler):
    """Writes each part of a state into a folder of its own, and hashes what this process writes.

    Its threads wait for `start_writing`, which the background thread calls: else they compete for the cores with what
    blocks training.
    """

    def __init__(self, *, compress: bool) -> None:
        self._of_part = ocp.PyTreeCheckpointHandler(use_compression=compress)
        self._held: list[tuple[ocp.path.atomicity.DeferredPath, epath.Path]] = []

    def start_writing(self) -> None:
        """Lets the threads write that `async_save` has started."""
        held, self._held = self._held, []
        for folder, path in held:
            folder.set_path(path)

    @override
    async def async_save(self, directory: epath.Path, args: "_SaveArgs") -> list[ocp.Future]:
        if jax.process_index() == 0:
            for name in args.parts:
                (directory / name).mkdir(exist_ok=True)  # another process may have begun to write into it
        futures: list[Any] = []
        for name, part in args.parts.items():
            folder = ocp.path.atomicity.DeferredPath()
            self._held.append((folder, directory / name))
            futures += await self._of_part.async_save(folder, args=ocp.args.PyTreeSave(part)) or []
            failpoint("save.copy", args.step)
        return [_Hashed(self.start_writing, futures, Path(directory), args.step)]

    @override
    def save(self, directory: epath.Path, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("checkpoints are saved asynchronously")

    @override
    def restore(self, directory: epath.Path, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("checkpoints are restored with TensorStore")

    @override
    def finalize(self, directory: epath.Path) -> None:
        for folder in Path(directory).iterdir():
            if folder.is_dir():
                self._of_part.finalize(epath.Path(folder))

    @override
    def close(self) -> None:
        self._of_part.close()


@ocp.args.register_with_handler(_Handler, for_save=True, for_restore=True)  # Orbax asks for both
@dataclass
class _SaveArgs(ocp.args.CheckpointArgs):
    """The step, and the parts of its state by name."""

    step: int
    parts: Mapping[str, Any]


class _Hashed(ocp.Future):
    """Lets this process write its files, and hashes them; a future as Orbax expects it.

    Orbax asks for the result in the background, once nothing blocks training any more.
    """

    def __init__(self, start_writing: Callable[[], None], futures: Sequence[Any], directory: Path, step: int) -> None:
        self._start_writing, self._futures, self._directory, self._step = start_writing, futures, directory, step

    @override
    def result(self, timeout: float | None = None) -> None:
        """Writes the hashes beside the files."""
        self._start_writing()
        failpoint("save.write", self._step)
        with ExitStack() as waits:  # for all, also if one fails: what goes on would log after the end
            for future in self._futures:
                waits.callback(future.result, timeout)
        index = jax.process_index()
        own = self._directory.glob(f"*/ocdbt.process_{index}/**/*")
        names = [path.relative_to(self._directory).as_posix() for path in own if path.is_file()]
        (self._directory / f"{_HASHES}{index}").write_bytes(encode_hashes(hash_files(self._directory, names)))


class _OrbaxLogFilter(logging.Filter):
    """Drops what Orbax logs below ERROR, and errors with a traceback, whose exceptions it also raises.

    An error without an exception passes: nothing else reports it.
    """

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        redundant = record.levelno < logging.ERROR or bool(record.exc_info)
        return not (redundant and "orbax" in Path(record.pathname).parts)
