"""The checkpoints in a bucket as objects. Imports no JAX."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, override

import numpy as np

from jaxinfra.checkpoint.bucket_index import FOLDER, leftover_folders, read_manifest, require_index, update_index
from jaxinfra.checkpoint.manifest import MANIFEST_FILE, DamageError, Manifest, verify_bytes
from jaxinfra.checkpoint.stored import Leftover, StoredCheckpoints
from jaxinfra.checkpoint.zarr_chunks import METADATA_FILE, ChunkedArray, Shard
from jaxinfra.errors import DataError
from jaxinfra.storage.lease import Lease
from jaxinfra.storage.objects import ObjectStore

_THREADS = 16  # each holds an object in memory, of up to 64 MiB


class StoredInBucket(StoredCheckpoints):
    """The checkpoints below a URL."""

    def __init__(self, url: str) -> None:
        self._store = ObjectStore(url)
        self.location = self._store.url

    @override
    def steps(self) -> list[int]:
        return sorted(map(int, self._index()["steps"]))

    @override
    def manifest(self, step: int) -> Manifest:
        entry = self._index()["steps"].get(str(step))
        if entry is None:
            raise DamageError(f"step {step} is not in the index any more")
        return read_manifest(self._store, step, entry)

    @override
    def missing(self, step: int, manifest: Manifest) -> list[str]:
        folder = self._folder(step)

        def check(name: str) -> str | None:
            try:
                self._store.check_sizes({f"{folder}/{name}": manifest.files[name].num_bytes})
            except DataError as error:
                return f"{name} {str(error).partition(': ')[2].partition(';')[0]}"
            return None

        return [problem for problem in _in_threads(check, [*manifest.files]) if problem is not None]

    @override
    def compare(self, step: int, manifest: Manifest) -> Iterator[tuple[str, int, DamageError | None]]:
        folder = self._folder(step)

        def compare(name: str) -> tuple[str, int, DamageError | None]:
            try:
                self._read(folder, name, manifest)
            except DamageError as damage:
                return name, manifest.files[name].num_bytes, damage
            return name, manifest.files[name].num_bytes, None

        yield from _in_threads(compare, [*manifest.files])

    @override
    def read_leaf(self, step: int, manifest: Manifest, name: str) -> np.ndarray:
        folder = self._folder(step)
        array = ChunkedArray.decode(self._read(folder, f"{name}/{METADATA_FILE}", manifest))
        whole = tuple(slice(0, size) for size in array.shape)
        shard, chunks = Shard(array, whole), [*array.chunks_in(whole)]
        contents = _in_threads(lambda chunk: self._read(folder, f"{name}/{chunk[0]}", manifest), chunks)
        for (_, index), content in zip(chunks, contents, strict=True):
            shard.add(index, array.values(content))
        return shard.take()

    @override
    def leftovers(self) -> list[Leftover]:
        index = self._index()
        sizes = [Leftover(name=name, kind="damaged", num_bytes=self._num_bytes(name)) for name in index["damaged"]]
        incomplete = leftover_folders(self._store, index)
        return sizes + [Leftover(name=name, kind="incomplete", num_bytes=self._num_bytes(name)) for name in incomplete]

    @override
    def delete(self, steps: Sequence[int], leftovers: Sequence[Leftover], lease: Lease) -> None:
        folders = [each.name for each in leftovers]

        def forget(index: dict[str, Any]) -> None:
            removed = [index["steps"].pop(str(step))["folder"] for step in steps if str(step) in index["steps"]]
            folders.extend(removed)
            index["damaged"] = [folder for folder in index["damaged"] if folder not in folders]

        update_index(self._store, lease.token, forget)
        for folder in dict.fromkeys(folders):
            lease.check_now()
            self._store.delete_below(folder)

    def _index(self) -> dict[str, Any]:
        return require_index(self._store) or {"token": 0, "steps": {}, "damaged": []}

    def _folder(self, step: int) -> str:
        entry = self._index()["steps"].get(str(step))
        if entry is None:
            raise DamageError(f"step {step} is not in the index any more")
        return entry["folder"]

    def _num_bytes(self, folder: str) -> int | None:
        """Returns the bytes that the manifest of a folder tells; None without a sound one."""
        content, match = self._store.read_or_none(f"{folder}/{MANIFEST_FILE}"), FOLDER.fullmatch(folder)
        if content is None or match is None:
            return None
        try:
            return Manifest.decode(content, int(match["step"])).num_bytes
        except DamageError:
            return None

    def _read(self, folder: str, name: str, manifest: Manifest) -> bytes:
        if name not in manifest.files:
            raise DamageError(f"{MANIFEST_FILE} has no {name}")
        content = self._store.read_or_none(f"{folder}/{name}")
        if content is None:
            raise DamageError(f"{name} is missing")
        verify_bytes(name, content, manifest)
        return content


def _in_threads[A, B](call: Callable[[A], B], arguments: Sequence[A]) -> Iterator[B]:
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            yield from pool.map(call, arguments)
        finally:
            pool.shutdown(cancel_futures=True)
