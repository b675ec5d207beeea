"""Saves and restores checkpoints in a bucket with TensorStore; Orbax cannot save to S3.

`checkpoints/` in the bucket has

- a folder `STEP.TOKEN.N` for each attempt to save: the N-th of the owner with this fencing token. It holds a zarr array
  for each leaf of the state, and the manifest, which has the hash of every object.
- `index.json`, which names the folder of each complete step. It is replaced by conditional writes only.

A step exists once the index names it. The index also holds the token of the owner of the run: an owner that has lost
its lease fails to replace it, however late it tries. A new owner deletes the attempts of earlier owners that the index
does not name, and nothing else.

Each process writes the chunks that it holds, and no two processes write the same. It reads back each one before the
step is complete, and each chunk that a restore reads is compared with its hash: nothing is read twice for that. The
processes need no shared directory: they tell each other whether their part has arrived, and all of them report the same
outcome.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, override

import jax
import numpy as np
import xxhash

from jaxinfra.checkpoint.bucket_index import folders, leftover_folders, require_index, update_index
from jaxinfra.checkpoint.bucket_steps import BucketSteps
from jaxinfra.checkpoint.config import CheckpointConfig, Metrics
from jaxinfra.checkpoint.leaves import PyTree, from_shards, leaf_types, local_shards, pending_bytes, place
from jaxinfra.checkpoint.manifest import MANIFEST_FILE, FileHash, Manifest, decode_hashes, encode_hashes, hash_bytes
from jaxinfra.checkpoint.pending import in_window
from jaxinfra.checkpoint.saver import Gather, Saver
from jaxinfra.checkpoint.zarr_chunks import METADATA_FILE, ChunkedArray, Index, Shard, relative
from jaxinfra.errors import RunInUseError, StorageError
from jaxinfra.failpoints import failpoint
from jaxinfra.parallel.spec import leaf_name, leaves_by_name
from jaxinfra.storage.background import in_thread
from jaxinfra.storage.errors import cause_of, is_storage_error
from jaxinfra.storage.lease import Lease

_HASHES = "hashes."  # the object of the hashes of one process, before process 0 writes the manifest

type _Chunks = Sequence[tuple[str, np.ndarray]]  # name of the object, values


class BucketSaver(Saver):
    """Saves and restores the state of a run below one URL; the other arguments are those of `CheckpointManager`.

    `before_commit` is called in a thread, once the shards of all processes have arrived.
    """

    def __init__(
        self,
        store: BucketSteps,
        config: CheckpointConfig,
        *,
        read_only: bool,
        lease: Lease | None = None,
        gather: Gather = lambda value: [value],
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._objects, self._config = store, store.objects, config
        self._gather, self._before_commit = gather, before_commit
        self._attempts = itertools.count(1)
        self._writing: Future[None] | None = None
        self._token: int | None = None if lease is None else lease.token
        if not read_only:
            self._claim()

    @override
    def save(self, step: int, state: PyTree, record: Mapping[str, object], metrics: Metrics) -> None:
        self.wait_until_finished()
        folder = f"{step}.{self._token}.{next(self._attempts)}"
        leaves = leaves_by_name(state)
        arrays = {name: _chunked(leaf) for name, leaf in leaves.items()}
        # On CPU these are views; JAX does not reuse a buffer while a view of it exists.
        with jax.transfer_guard("allow"):
            chunks = [chunk for name, leaf in leaves.items() for chunk in _own_chunks(name, leaf, arrays[name])]
        manifest = partial(Manifest, step=step, leaves=leaf_types(state), record=record, metrics=metrics)
        max_bytes = pending_bytes(state)
        failpoint("save.copy", step)

        def write() -> None:
            failpoint("save.write", step)
            self._write(folder, arrays, chunks, max_bytes)
            failpoint("save.manifest", step)
            self._commit(folder, manifest)

        self._writing = in_thread(write, "checkpoint", daemon=False)

    @override
    def is_saving(self) -> bool:
        return self._writing is not None and not self._writing.done()

    @override
    def wait_until_finished(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @override
    def restore[T](self, step: int, abstract: T) -> T:
        manifest = self._store.manifest(step)
        paths, tree = jax.tree.flatten_with_path(abstract)
        leaves = {leaf_name(path): leaf for path, leaf in paths}
        metadata = self._store.read(step, manifest, [f"{name}/{METADATA_FILE}" for name in leaves])
        arrays = [ChunkedArray.decode(content) for _, content in metadata]
        failpoint("restore", step)
        with jax.transfer_guard("allow"):
            readers = [_ArrayReader(*leaf, array) for leaf, array in zip(leaves.items(), arrays, strict=True)]
            uses = {name: use for reader in readers for name, use in reader.uses()}
            for name, content in self._store.read(step, manifest, uses, pending_bytes(abstract)):
                uses[name](content)
            return jax.tree.unflatten(tree, [reader.array() for reader in readers])

    @override
    def set_aside(self, step: int) -> str:
        folder = self._store.folder(step)

        def move(index: dict[str, Any]) -> None:
            if index["steps"].pop(str(step), None):
                index["damaged"].append(folder)

        self._store.known = update_index(self._objects, self._token, move)["steps"]
        return self._objects.url_of(folder)

    @override
    def reset(self) -> None:
        self._writing = None

    @override
    def close(self) -> None:
        if self._writing is not None:
            wait([self._writing])

    def _claim(self) -> None:
        """Claims the index for the owner of the run, and deletes what attempts of earlier owners have left."""
        index = None
        if _is_main():
            require_index(self._objects)
            index = update_index(self._objects, self._token, lambda index: None)
            # A newer owner may commit folders from now on: those have its token.
            for folder, token in leftover_folders(self._objects, index).items():
                if token < index["token"]:
                    self._objects.delete_below(folder)
        index = self._gather(index)[0]
        self._token, self._store.known = index["token"], index["steps"]

    def _write(self, folder: str, arrays: Mapping[str, ChunkedArray], chunks: _Chunks, max_bytes: int) -> None:
        """Writes the chunks of this process, and waits for those of the others; raises the first error of all."""
        problem = None
        try:
            hashes = self._write_chunks(folder, chunks, max_bytes)
            if _is_main():
                for name, array in arrays.items():
                    content = array.encode()
                    self._objects.write(f"{folder}/{name}/{METADATA_FILE}", content)
                    hashes[f"{name}/{METADATA_FILE}"] = hash_bytes(content)
            self._objects.write(f"{folder}/{_HASHES}{jax.process_index()}", encode_hashes(hashes))
        except Exception as error:
            if jax.process_count() == 1 or not is_storage_error(error):
                raise
            problem = cause_of(error)
        for index, each in enumerate(self._gather(problem)):
            if each is not None:
                raise StorageError(f"process {index}: {each}")

    def _write_chunks(self, folder: str, chunks: _Chunks, max_bytes: int) -> dict[str, FileHash]:
        """Writes chunks, as many at once as have `max_bytes`, and reads them back; returns the hash of each."""
        hashes: dict[str, FileHash] = {}

        def start_write(name: str, values: np.ndarray) -> Any:
            content = values.tobytes()
            hashes[name] = hash_bytes(content)
            return self._objects.start_write(f"{folder}/{name}", content)

        writes = ((partial(start_write, *chunk), chunk[1].nbytes) for chunk in chunks)
        for write in in_window(writes, max_bytes):
            write.result()
        reads = (
            (partial(self._objects.start_read, f"{folder}/{name}"), each.num_bytes) for name, each in hashes.items()
        )
        for (name, expected), read in zip(hashes.items(), in_window(reads, max_bytes), strict=True):
            result = read.result()
            if result.state != "value" or hash_bytes(result.value) != expected:
                raise StorageError(f"{self._objects.url_of(folder)}/{name}: does not hold what was just written")
        return hashes

    def _commit(self, folder: str, manifest: partial[Manifest]) -> None:
        """Puts a step into the index, without those that are not kept any longer, which it deletes."""
        problem: tuple[bool, str] | None = None
        if _is_main():
            try:
                self._before_commit()
                self._publish(folder, manifest)
            except Exception as error:
                is_lost = isinstance(error, RunInUseError)
                if jax.process_count() == 1 or not (is_lost or is_storage_error(error)):
                    raise
                problem = is_lost, cause_of(error)
        problem, self._store.known = self._gather((problem, self._store.known))[0]
        if problem is not None:
            is_lost, cause = problem
            raise (RunInUseError if is_lost else StorageError)(cause)

    def _publish(self, folder: str, manifest: partial[Manifest]) -> None:
        hashes: dict[str, FileHash] = {}
        for index in range(jax.process_count()):
            hashes |= decode_hashes(self._objects.read(f"{folder}/{_HASHES}{index}"))
            self._objects.delete(f"{folder}/{_HASHES}{index}")
        complete = manifest(files=dict(sorted(hashes.items())))
        content = complete.encode()
        self._objects.write(f"{folder}/{MANIFEST_FILE}", content)
        if self._objects.read(f"{folder}/{MANIFEST_FILE}") != content:
            raise StorageError(f"{self._objects.url_of(folder)}/{MANIFEST_FILE}: does not hold what was just written")
        entry = {
            "folder": folder,
            "manifest": xxhash.xxh3_128_hexdigest(content),
            "metrics": dict(complete.metrics),
        }

        def add(index: dict[str, Any]) -> None:
            steps = index["steps"]
            steps[str(complete.step)] = entry
            for each in self._config.superseded({int(step): each["metrics"] for step, each in steps.items()}):
                del steps[str(each)]

        before = folders(self._store.known or {})
        self._store.known = kept = update_index(self._objects, self._token, add)["steps"]
        failpoint("save.delete", complete.step)
        for each in sorted({*before, folder}.difference(folders(kept))):
            self._objects.delete_below(each)


def _is_main() -> bool:
    return jax.process_index() == 0


def _chunked(leaf: jax.Array) -> ChunkedArray:
    return ChunkedArray.of(leaf.shape, leaf.sharding.shard_shape(leaf.shape), np.dtype(leaf.dtype))


def _own_chunks(name: str, leaf: jax.Array, array: ChunkedArray) -> Iterator[tuple[str, np.ndarray]]:
    """Yields object name and values of each chunk that this process writes: of one of all replicas of a shard."""
    shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
    for shard in shards:
        shard.data.copy_to_host_async()
    for shard in shards:
        values = np.asarray(shard.data)
        for key, index in array.chunks_in(shard.index):
            yield f"{name}/{key}", values[relative(shard.index, array.shape, index)]


class _ArrayReader:
    """Puts together the shards of one array that this process has; each goes onto its devices once it is complete."""

    def __init__(self, name: str, abstract: jax.ShapeDtypeStruct, stored: ChunkedArray) -> None:
        self._name, self._abstract, self._stored = name, abstract, stored
        self._on_devices: list[jax.Array] = []
        self._shards = local_shards(abstract)

    def uses(self) -> Iterator[tuple[str, Callable[[bytes], None]]]:
        """Yields the name of each object to read, and what to do with its content; each is read once."""
        users: dict[str, tuple[Index, list[tuple[Shard, list[Any]]]]] = {}
        for index, onto in self._shards:
            shard = Shard(self._stored, index)
            for key, chunk_index in self._stored.chunks_in(index):
                users.setdefault(key, (chunk_index, []))[1].append((shard, onto))
            if not shard.missing:  # an array without values
                self._place(shard, onto)

        def use(content: bytes, key: str) -> None:
            chunk_index, shards = users[key]
            values = self._stored.values(content)
            for shard, onto in shards:
                shard.add(chunk_index, values)
                if not shard.missing:
                    self._place(shard, onto)

        for key in users:
            yield f"{self._name}/{key}", partial(use, key=key)

    def array(self) -> jax.Array:
        """Returns the array, once all objects have been used."""
        return from_shards(self._abstract, self._on_devices)

    def _place(self, shard: Shard, onto: Sequence[Any]) -> None:
        self._on_devices += place(shard.take(), self._abstract, onto)
