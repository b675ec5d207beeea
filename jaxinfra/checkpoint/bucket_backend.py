"""Reads and writes checkpoints in a bucket with TensorStore; Orbax cannot save to S3.

`checkpoints/` in the bucket has

- a folder `STEP.TOKEN.N` for each attempt to save: the N-th of the owner with this fencing token. It holds a zarr array
  for each leaf of the state, and `checkpoint.json` with the types of the leaves and the run record.
- `index.json`, which names the folder of each complete step. It is replaced by conditional writes only.

A step exists once the index names it. The index also holds the token of the owner of the run: an owner that has lost
its lease fails to replace it, however late it tries. Each chunk ends with its CRC-32C, which TensorStore checks.

Each process writes the shards that it holds, and no two processes write the same. They need no shared directory: they
tell each other whether their part has arrived, and all of them report the same outcome.
"""

import itertools
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import tensorstore as ts

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import PyTree, leaf_name, leaf_types
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.storage.connection import kvstore_spec, tensorstore_context
from jaxinfra.storage.errors import cause_of, is_storage_error
from jaxinfra.storage.lease import Lease
from jaxinfra.storage.objects import ObjectStore

type Gather = Callable[[Any], Sequence[Any]]
"""Returns the values (JSON) of all processes by index; each must call it equally often."""

_INDEX, _CHECKPOINT = "index.json", "checkpoint.json"
_MAX_CHUNK_BYTES = 64 << 20  # an object is written by one request, which holds it in memory
_MAX_PENDING_BYTES = 1 << 30  # of host memory, for chunks on their way

type _Index = dict[str, Any]
type _Layout = Mapping[str, Any]  # zarr metadata
type _Shards = Sequence[tuple[Any, np.ndarray]]  # index in the array, values


class BucketBackend:
    """The checkpoints below one URL; the methods are those of `OrbaxBackend`.

    Args:
        url: of the folder of all checkpoints.
        config: which steps to keep.
        read_only: whether to leave everything as it is.
        lease: of the run, in the process that commits; None if there are no other owners.
        gather: of the processes that save together.
        before_commit: is called in the process that commits once all shards have arrived, in a thread.
    """

    def __init__(
        self,
        url: str,
        config: CheckpointConfig,
        *,
        read_only: bool,
        lease: Lease | None = None,
        gather: Gather = lambda value: [value],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._config, self._read_only = ObjectStore(url), config, read_only
        self._lease, self._gather, self._before_commit = lease, gather, before_commit
        self._attempts = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._folders: dict[int, str] = {}
        self._token = 0
        if not read_only:
            self._open()

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        if self._read_only:
            self._folders = _folders(self._read_index())
        return sorted(self._folders)  # of a writer: nobody else changes them

    def save(self, step: int, state: PyTree, record: Mapping[str, object]) -> None:
        """Starts to write a step; returns when the arrays may be changed or donated."""
        self.wait_until_finished()
        folder = f"{step}.{self._token}.{next(self._attempts)}"
        leaves = {leaf_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
        # On CPU these are views; JAX does not reuse a buffer while a view of it exists.
        with jax.transfer_guard("allow"):
            shards = {name: _own_shards(leaf) for name, leaf in leaves.items()}
        layouts = {name: _layout(leaf) for name, leaf in leaves.items()}
        content = json.dumps({"leaves": leaf_types(state), "record": record}).encode()

        def write() -> None:
            try:
                self._write(folder, layouts, shards, content)
                self._commit(step, folder)
            except Exception as error:  # raised by `wait_until_finished`
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def is_saving(self) -> bool:
        """Returns whether a step is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait_until_finished(self) -> None:
        """Waits until the step being written, if any, is complete and old steps are deleted; raises its error."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def leaf_types(self, step: int) -> dict[str, str]:
        """Returns the type of each leaf of a step's state by name."""
        return self._checkpoint(step)["leaves"]

    def load_record(self, step: int) -> dict[str, Any]:
        """Loads the record saved with a step."""
        return self._checkpoint(step)["record"]

    def restore[T](self, step: int, abstract: T, *, partial: bool = False) -> T:
        """Restores the state of a step, or with `partial` a part of it; `abstract` has `jax.ShapeDtypeStruct`s."""
        url = self._store.url_of(self._folders[step])
        paths, tree = jax.tree.flatten_with_path(abstract)
        window = _Window()
        with jax.transfer_guard("allow"):
            arrays = [_restore_array(f"{url}/{leaf_name(path)}", leaf, window) for path, leaf in paths]
            return jax.tree.unflatten(tree, [finish() for finish in arrays])

    def reset(self) -> None:
        """Forgets a save that has failed; what it has written is deleted when the run is opened again."""
        self._error = None

    def close(self) -> None:
        """Waits for the step being written."""
        if self._thread is not None:
            self._thread.join()

    def _open(self) -> None:
        """Claims the index for the owner of the run, and deletes what earlier attempts have left."""
        if _is_main():
            self._update_index(lambda steps: None)
            in_use = {_INDEX, *_folders(self._read_index()).values()}
            for folder in {name.partition("/")[0] for name in self._store.list_names()} - in_use:
                self._store.delete_below(folder)
        index = self._gather(self._read_index() if _is_main() else None)[0]
        self._token, self._folders = index["token"], _folders(index)

    def _write(
        self, folder: str, layouts: Mapping[str, _Layout], shards: Mapping[str, _Shards], content: bytes
    ) -> None:
        """Writes the shards of this process, and waits for those of the others; raises the first error of all."""
        url, window, problem = self._store.url_of(folder), _Window(), None
        try:
            for name, layout in layouts.items():
                if _is_main() or shards[name]:
                    array = _open(f"{url}/{name}", layout, create=_is_main())
                    for index, shard in shards[name]:
                        window.add(array[index].write(shard), shard.nbytes)
            if _is_main():
                self._store.write(f"{folder}/{_CHECKPOINT}", content)
            window.wait()
        except Exception as error:
            if jax.process_count() == 1 or not _is_failure_of_storage(error):
                raise
            problem = cause_of(error)
        for index, each in enumerate(self._gather(problem)):
            if each is not None:
                raise StorageError(f"process {index}: {each}")

    def _commit(self, step: int, folder: str) -> None:
        """Puts a step into the index, without those that are not kept any longer, which it deletes."""
        problem: tuple[bool, str] | None = None
        if _is_main():
            try:
                self._before_commit()
                self._publish(step, folder)
            except Exception as error:
                is_lost = isinstance(error, ConfigError)
                if jax.process_count() == 1 or not (is_lost or _is_failure_of_storage(error)):
                    raise
                problem = is_lost, cause_of(error)
        problem, folders = self._gather((problem, list(self._folders.items())))[0]
        self._folders = dict(folders)
        if problem is not None:
            is_lost, cause = problem
            raise (ConfigError if is_lost else StorageError)(cause)

    def _publish(self, step: int, folder: str) -> None:
        superseded: list[str] = []

        def add(steps: dict[str, str]) -> None:
            steps[str(step)] = folder
            superseded[:] = [steps.pop(str(each)) for each in _superseded(map(int, steps), self._config)]

        self._folders = _folders(self._update_index(add))
        for each in superseded:
            self._store.delete_below(each)

    def _read_index(self) -> _Index:
        content = self._store.read_or_none(_INDEX)
        return {} if content is None else json.loads(content)

    def _update_index(self, change: Callable[[dict[str, str]], None]) -> _Index:
        """Changes the steps of the index, and returns it; raises ConfigError if a newer owner has claimed it."""
        result: list[_Index] = []

        def update(old: bytes | None) -> bytes:
            index: _Index = {"token": 0, "steps": {}} if old is None else json.loads(old)
            token = index["token"] if self._lease is None else self._lease.token
            if index["token"] > token:
                raise ConfigError(f"{self._store.url}: another process has taken over this run; leave the run to it")
            change(index["steps"])
            result[:] = [{"token": token, "steps": index["steps"]}]
            return json.dumps(result[0]).encode()

        self._store.atomic_update(_INDEX, update)
        return result[0]

    def _checkpoint(self, step: int) -> dict[str, Any]:
        return json.loads(self._store.read(f"{self._folders[step]}/{_CHECKPOINT}"))


class _Window:
    """Writes and reads on their way; `add` waits while they take too much memory."""

    def __init__(self) -> None:
        self._pending: deque[tuple[ts.Future[Any], int]] = deque()
        self._bytes = 0

    def add(self, future: Any, num_bytes: int) -> None:
        self._pending.append((future, num_bytes))
        self._bytes += num_bytes
        while self._bytes > _MAX_PENDING_BYTES:
            self._finish_first()

    def wait(self) -> None:
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        future, num_bytes = self._pending.popleft()
        future.result()
        self._bytes -= num_bytes


def _is_main() -> bool:
    return jax.process_index() == 0


def _is_failure_of_storage(error: Exception) -> bool:
    return isinstance(error, StorageError) or is_storage_error(error)


def _superseded(steps: Iterable[int], config: CheckpointConfig) -> list[int]:
    """Returns the steps that need not be kept."""
    ordered = sorted(steps)
    keep_every = config.keep_every
    return [step for step in ordered[: -config.keep_last] if keep_every is None or step % keep_every]


def _folders(index: _Index) -> dict[int, str]:
    return {int(step): folder for step, folder in index.get("steps", {}).items()}


def _own_shards(array: jax.Array) -> _Shards:
    """Returns index and values of each shard that this process writes: one of all replicas of a shard is written."""
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    for shard in shards:
        shard.data.copy_to_host_async()
    return [(shard.index, np.asarray(shard.data)) for shard in shards]


def _layout(array: jax.Array) -> _Layout:
    """Returns the zarr metadata of an array: a chunk is a shard, or an equal part of one."""
    chunk = list(array.sharding.shard_shape(array.shape))
    while math.prod(chunk) * array.dtype.itemsize > _MAX_CHUNK_BYTES and max(chunk) > 1:
        dim = chunk.index(max(chunk))
        factor = next(factor for factor in range(2, chunk[dim] + 1) if chunk[dim] % factor == 0)
        chunk[dim] //= factor
    return {
        "shape": array.shape,
        "data_type": np.dtype(array.dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, size) for size in chunk]}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "fill_value": 0,
    }


def _open(url: str, layout: _Layout | None = None, *, create: bool = False) -> Any:
    """Opens an array, or with a layout creates it; a process that does not create it takes the layout as given."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore_spec(url)}
    if layout is None:
        return ts.open(spec, context=tensorstore_context(), read=True).result()
    spec |= {"metadata": layout}
    # "open", too: the answer to a first try to create it may be lost.
    options = {"create": True, "open": True} if create else {"open": True, "assume_metadata": True}
    return ts.open({**spec, **options}, context=tensorstore_context()).result()


def _restore_array(url: str, abstract: jax.ShapeDtypeStruct, window: _Window) -> Callable[[], jax.Array]:
    """Starts to read the shards of this process, each once; returns what makes the array of them."""
    sharding = cast(jax.sharding.Sharding, abstract.sharding)
    source = _open(url)
    reads: dict[str, Any] = {}
    for index in sharding.addressable_devices_indices_map(abstract.shape).values():
        if str(index) not in reads:
            shard_bytes = math.prod(sharding.shard_shape(abstract.shape)) * abstract.dtype.itemsize
            reads[str(index)] = source[index].read()
            window.add(reads[str(index)], shard_bytes)
    return lambda: jax.make_array_from_callback(
        abstract.shape, sharding, lambda index: np.asarray(reads[str(index)].result(), abstract.dtype)
    )
