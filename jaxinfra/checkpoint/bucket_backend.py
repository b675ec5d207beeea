"""Reads and writes checkpoints in a bucket with TensorStore; Orbax cannot save to S3.

`checkpoints/` in the bucket has

- a folder `STEP.TOKEN.N` for each attempt to save: the N-th of the owner with this fencing token. It holds a zarr array
  for each leaf of the state, and `checkpoint.json` with the types of the leaves and the run record.
- `index.json`, which names the folder of each complete step. It is replaced by conditional writes only.

A step exists once the index names it. The index also holds the token of the owner of the run: an owner that has lost
its lease fails to replace it, however late it tries. A new owner deletes the attempts of earlier owners that the index
does not name, and nothing else. Every chunk is stored, with its CRC-32C, which TensorStore checks: one that is missing
or damaged ends a restore.

Each process writes the shards that it holds, and no two processes write the same. They need no shared directory: they
tell each other whether their part has arrived, and all of them report the same outcome.
"""

import functools
import itertools
import json
import math
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import jax
import numpy as np
import tensorstore as ts

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.leaves import PyTree, leaf_name, leaf_types
from jaxinfra.errors import CheckpointError, RunInUseError, StorageError
from jaxinfra.storage.connection import kvstore_spec, tensorstore_context
from jaxinfra.storage.errors import cause_of, is_storage_error
from jaxinfra.storage.lease import Lease
from jaxinfra.storage.objects import ObjectStore

type Gather = Callable[[Any], Sequence[Any]]
"""Returns the values (JSON) of all processes by index; each must call it equally often."""

_INDEX, _CHECKPOINT = "index.json", "checkpoint.json"
_FOLDER = re.compile(r"\d+\.(?P<token>\d+)\.\d+")
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
        self._gather, self._before_commit = gather, before_commit
        self._attempts = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._folders: dict[int, str] = {}
        self._token: int | None = None if lease is None else lease.token
        if not read_only:
            self._claim()

    def all_steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, ascending."""
        if self._read_only:
            self._folders = _folders(_require_index(self._store) or {})
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
        arrays = [_open_array(f"{url}/{leaf_name(path)}") for path, _ in paths]  # all at once
        window = _Window()
        with jax.transfer_guard("allow"):
            parts = [_read_array(array.result(), leaf, window) for array, (_, leaf) in zip(arrays, paths, strict=True)]
            window.wait()
            restored = [
                jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)
                for shards, (_, leaf) in zip(parts, paths, strict=True)
            ]
        return jax.tree.unflatten(tree, restored)

    def reset(self) -> None:
        """Forgets a save that has failed; what it has written is deleted when the run is opened again."""
        self._error = None

    def close(self) -> None:
        """Waits for the step being written."""
        if self._thread is not None:
            self._thread.join()

    def _claim(self) -> None:
        """Claims the index for the owner of the run, and deletes what attempts of earlier owners have left."""
        index = None
        if _is_main():
            _require_index(self._store)
            index = self._update_index(lambda steps: None)
            # A newer owner may commit folders from now on: those have its token.
            for folder in {name.partition("/")[0] for name in self._store.list_names()} - {*index["steps"].values()}:
                if (match := _FOLDER.fullmatch(folder)) and int(match["token"]) < index["token"]:
                    self._store.delete_below(folder)
        index = self._gather(index)[0]
        self._token, self._folders = index["token"], _folders(index)

    def _write(
        self, folder: str, layouts: Mapping[str, _Layout], shards: Mapping[str, _Shards], content: bytes
    ) -> None:
        """Writes the shards of this process, and waits for those of the others; raises the first error of all."""
        url, window, problem = self._store.url_of(folder), _Window(), None
        try:
            for name, layout in layouts.items():
                if _is_main() or shards[name]:
                    array = _open_array(f"{url}/{name}", layout, create=_is_main()).result()
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
                is_lost = isinstance(error, RunInUseError)
                if jax.process_count() == 1 or not (is_lost or _is_failure_of_storage(error)):
                    raise
                problem = is_lost, cause_of(error)
        problem, folders = self._gather((problem, list(self._folders.items())))[0]
        self._folders = dict(folders)
        if problem is not None:
            is_lost, cause = problem
            raise (RunInUseError if is_lost else StorageError)(cause)

    def _publish(self, step: int, folder: str) -> None:
        def add(steps: dict[str, str]) -> None:
            steps[str(step)] = folder
            for each in _superseded(map(int, steps), self._config):
                del steps[str(each)]

        before = {*self._folders.values()}
        self._folders = _folders(self._update_index(add))
        for each in sorted(before.difference(self._folders.values())):
            self._store.delete_below(each)

    def _update_index(self, change: Callable[[dict[str, str]], None]) -> _Index:
        """Changes the steps of the index, and returns it; raises RunInUseError if a newer owner has claimed it.

        An owner without a lease has the next token.
        """
        result: list[_Index] = []

        def update(old: bytes | None) -> bytes:
            index = {"token": 0, "steps": {}} if old is None else _parse_index(self._store, old)
            token = index["token"] + 1 if self._token is None else self._token
            if index["token"] > token:
                raise RunInUseError(f"{self._store.url}: another process has taken over this run; leave the run to it")
            change(index["steps"])
            result[:] = [{"token": token, "steps": index["steps"]}]
            return json.dumps(result[0]).encode()

        self._store.atomic_update(_INDEX, update)
        return result[0]

    def _checkpoint(self, step: int) -> dict[str, Any]:
        return json.loads(self._store.read(f"{self._folders[step]}/{_CHECKPOINT}"))


class _Window:
    """Writes and reads on their way; `add` waits while they take too much memory.

    The result of each is passed to `use`, in order, and then forgotten.
    """

    def __init__(self) -> None:
        self._pending: deque[tuple[ts.Future[Any], int, Callable[[Any], object]]] = deque()
        self._bytes = 0

    def add(self, future: Any, num_bytes: int, use: Callable[[Any], object] = lambda result: None) -> None:
        self._bytes += num_bytes
        self._pending.append((future, num_bytes, use))
        while self._bytes > _MAX_PENDING_BYTES:
            self._finish_first()

    def wait(self) -> None:
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        future, num_bytes, use = self._pending.popleft()
        use(future.result())
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


def _read_index(store: ObjectStore) -> _Index | None:
    content = store.read_or_none(_INDEX)
    return None if content is None else _parse_index(store, content)


def _parse_index(store: ObjectStore, content: bytes) -> _Index:
    try:
        return {"token": int((index := json.loads(content))["token"]), "steps": dict(index["steps"])}
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{store.url_of(_INDEX)}: damaged; restore it from a copy") from None


def _require_index(store: ObjectStore) -> _Index | None:
    """Returns the index, None before the first owner; CheckpointError if there are checkpoints without an index."""
    if (index := _read_index(store)) is not None:
        return index
    paths = map(PurePosixPath, store.list_names())
    folders = [path.parts[0] for path in paths if path.name == _CHECKPOINT and _FOLDER.fullmatch(path.parts[0])]
    index = _read_index(store)  # the first owner may have written both in the meantime
    if folders and index is None:
        raise CheckpointError(
            f"{store.url_of(_INDEX)}: missing, but there are checkpoints, such as {folders[0]}; restore it, or move "
            "them away to start at step 0"
        )
    return index


def owner_token(url: str) -> int:
    """Returns the token of the last owner of the checkpoints below a URL; 0 without one."""
    return (_read_index(ObjectStore(url)) or {"token": 0})["token"]


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


def _open_array(url: str, layout: _Layout | None = None, *, create: bool = False) -> Any:
    """Starts to open an array, or with a layout to create it; a process that does not create it trusts the layout."""
    spec: dict[str, Any] = {"driver": "zarr3", "kvstore": kvstore_spec(url)}
    if layout is None:
        # Else a chunk that is missing is read as zeros.
        return ts.open({**spec, "fill_missing_data_reads": False}, context=tensorstore_context(), read=True)
    spec |= {"metadata": layout, "store_data_equal_to_fill_value": True}
    # "open", too: the answer to a first try to create it may be lost.
    options = {"create": True, "open": True} if create else {"open": True, "assume_metadata": True}
    return ts.open({**spec, **options}, context=tensorstore_context())


def _read_array(source: Any, abstract: jax.ShapeDtypeStruct, window: _Window) -> list[jax.Array]:
    """Starts to read the shards of this process, each once; they go onto their devices as they arrive.

    Returns the list that has all of them once the window has no reads left.
    """
    sharding = cast(jax.sharding.Sharding, abstract.sharding)
    shards: list[jax.Array] = []
    devices: dict[str, tuple[Any, list[Any]]] = {}  # by index in the array: replicas have the same
    for device, index in sharding.addressable_devices_indices_map(abstract.shape).items():
        devices.setdefault(str(index), (index, []))[1].append(device)

    def place(content: np.ndarray, onto: Sequence[Any]) -> None:
        values = np.asarray(content, abstract.dtype)
        places = [jax.sharding.SingleDeviceSharding(each, memory_kind=sharding.memory_kind) for each in onto]
        shards.extend(jax.device_put(values, each) for each in places)

    shard_bytes = math.prod(sharding.shard_shape(abstract.shape)) * abstract.dtype.itemsize
    for index, onto in devices.values():
        window.add(source[index].read(), shard_bytes, functools.partial(place, onto=onto))
    return shards
