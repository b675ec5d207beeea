"""The checkpoints in a bucket as objects. Imports no JAX."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, override

import numpy as np

from jaxinfra.checkpoint.bucket_index import FOLDER, Steps, leftover_folders, read_manifest, require_index, update_index
from jaxinfra.checkpoint.manifest import MANIFEST_FILE, DamageError, Manifest, in_threads, verify_bytes
from jaxinfra.checkpoint.pending import in_window
from jaxinfra.checkpoint.step_store import Leftover, StepStore
from jaxinfra.checkpoint.zarr_chunks import METADATA_FILE, ChunkedArray, Shard
from jaxinfra.errors import DataError
from jaxinfra.storage.errors import call_storage
from jaxinfra.storage.lease import Lease
from jaxinfra.storage.objects import ObjectStore

_THREADS = 16  # each asks for the size of an object
_PENDING_BYTES = 1 << 30  # of host memory, for objects on their way to a command, which has no state


class BucketSteps(StepStore):
    """The checkpoints below a URL.

    Attributes:
        objects: below the URL.
        known: the steps of a writer, which nobody else changes; None for a reader, which asks the index each time.
    """

    def __init__(self, url: str) -> None:
        self.objects = ObjectStore(url)
        self.location = self.objects.url
        self.known: Steps | None = None

    @override
    def steps(self) -> list[int]:
        return sorted(map(int, self._steps()))

    @override
    def manifest(self, step: int) -> Manifest:
        return read_manifest(self.objects, step, self._entry(step))

    @override
    def missing(self, step: int, manifest: Manifest) -> list[str]:
        folder = self.folder(step)

        def check(name: str) -> str | None:
            try:
                self.objects.check_sizes({f"{folder}/{name}": manifest.files[name].num_bytes})
            except DataError as error:
                return f"{name} {str(error).partition(': ')[2].partition(';')[0]}"
            return None

        return [problem for problem in in_threads(check, [*manifest.files], _THREADS) if problem is not None]

    @override
    def compare(self, step: int, manifest: Manifest) -> Iterator[tuple[str, int, DamageError | None]]:
        for name, found in self._read(step, manifest, manifest.files):
            yield name, manifest.files[name].num_bytes, found if isinstance(found, DamageError) else None

    @override
    def read_leaf(self, step: int, manifest: Manifest, name: str) -> np.ndarray:
        ((_, metadata),) = self.read(step, manifest, [f"{name}/{METADATA_FILE}"])
        array = ChunkedArray.decode(metadata)
        whole = tuple(slice(0, size) for size in array.shape)
        shard, chunks = Shard(array, whole), {f"{name}/{key}": index for key, index in array.chunks_in(whole)}
        for chunk, content in self.read(step, manifest, chunks):
            shard.add(chunks[chunk], array.values(content))
        return shard.take()

    @override
    def leftovers(self) -> list[Leftover]:
        index = require_index(self.objects)
        sizes = [Leftover(name=name, kind="damaged", num_bytes=self._num_bytes(name)) for name in index["damaged"]]
        incomplete = leftover_folders(self.objects, index)
        return sizes + [Leftover(name=name, kind="incomplete", num_bytes=self._num_bytes(name)) for name in incomplete]

    @override
    def delete(self, steps: Sequence[int], leftovers: Sequence[Leftover], lease: Lease) -> None:
        folders = [each.name for each in leftovers]

        def forget(index: dict[str, Any]) -> None:
            removed = [index["steps"].pop(str(step))["folder"] for step in steps if str(step) in index["steps"]]
            folders.extend(removed)
            index["damaged"] = [folder for folder in index["damaged"] if folder not in folders]

        update_index(self.objects, lease.token, forget)
        for folder in dict.fromkeys(folders):
            lease.check_now()
            self.objects.delete_below(folder)

    def folder(self, step: int) -> str:
        """Returns the folder of a step."""
        return self._entry(step)["folder"]

    def read(
        self, step: int, manifest: Manifest, names: Iterable[str], max_bytes: int = _PENDING_BYTES
    ) -> Iterator[tuple[str, bytes]]:
        """Reads objects of a step, as many at once as have `max_bytes`, and yields the content of each, as hashed.

        Raises DamageError for the first that is missing or damaged, or StorageError while the bucket cannot be reached,
        which says nothing about the step.
        """
        for name, found in self._read(step, manifest, names, max_bytes):
            if isinstance(found, DamageError):
                raise found
            yield name, found

    def _read(
        self, step: int, manifest: Manifest, names: Iterable[str], max_bytes: int = _PENDING_BYTES
    ) -> Iterator[tuple[str, bytes | DamageError]]:
        """Yields what is wrong with an object in place of its content."""
        folder, names = self.folder(step), [*names]
        if unknown := [name for name in names if name not in manifest.files]:
            raise DamageError(f"{folder}/{MANIFEST_FILE} has no {unknown[0]}")
        reads = (
            (partial(self.objects.start_read, f"{folder}/{name}"), manifest.files[name].num_bytes) for name in names
        )
        for name, read in zip(names, in_window(reads, max_bytes), strict=True):
            found: bytes | DamageError
            try:
                result = call_storage(self.objects.url_of(f"{folder}/{name}"), read.result)
                if result.state != "value":
                    raise DamageError(f"{folder}/{name} is missing")
                found = result.value  # a copy each time
                verify_bytes(name, found, manifest)
            except DataError as error:
                found = DamageError(str(error).partition(";")[0])
            except DamageError as damage:
                found = damage
            yield name, found

    def _steps(self) -> Steps:
        return require_index(self.objects)["steps"] if self.known is None else self.known

    def _entry(self, step: int) -> Mapping[str, Any]:
        entry = self._steps().get(str(step))
        if entry is None:
            raise DamageError(f"step {step} is not in the index any more")
        return entry

    def _num_bytes(self, folder: str) -> int | None:
        """Returns the bytes that the manifest of a folder tells; None without a sound one."""
        content, match = self.objects.read_or_none(f"{folder}/{MANIFEST_FILE}"), FOLDER.fullmatch(folder)
        if content is None or match is None:
            return None
        try:
            return Manifest.decode(content, int(match["step"])).num_bytes
        except DamageError:
            return None
