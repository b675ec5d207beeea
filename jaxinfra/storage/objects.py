"""Named objects in a folder, `s3://bucket/prefix` or `gs://bucket/prefix`, all through TensorStore.

Objects are written whole or not at all. A request that fails is retried for a limited time, then raises an error that
names the URL.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import tensorstore as ts

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.storage.connection import kvstore_spec, normalize_url, tensorstore_context
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX, call_storage, classify_error
from jaxinfra.storage.known_reads import ask_once

_UPLOAD_THREADS = 8  # each holds a file in memory: a shard of tokens has 32 or 64 MiB
_CHECK_THREADS = 32  # as many requests as TensorStore makes at once
_COMPARED_BYTES = 256
_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once


class ObjectStore:
    """The objects below one URL; safe to use from several threads.

    Every method that accesses storage raises StorageError if it cannot be read or written.
    """

    def __init__(self, url: str | Path, *, fix: str = DAMAGED_VERSION_FIX):
        """Parses the URL without accessing storage; raises ConfigError if it is invalid or contains credentials."""
        self.url, self._fix = normalize_url(str(url)), fix  # what to do if an object is missing or damaged
        spec = kvstore_spec(self.url)
        try:
            self._objects = ts.KvStore.open(spec, context=tensorstore_context()).result()
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}; use a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX") from None

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a bucket."""
        return None if "://" in self.url else Path(self.url)

    def url_of(self, name: str) -> str:
        """Returns the URL of an object."""
        return f"{self.url}/{name}"

    def child(self, name: str) -> Self:
        """Returns the store of the objects below `name`."""
        return type(self)(self.url_of(name), fix=self._fix)

    def read(self, name: str) -> bytes:
        """Reads an object; raises DataError if it is missing."""
        return ask_once("read", self.url_of(name), lambda: self._read(name))

    def _read(self, name: str) -> bytes:
        if (content := self.read_or_none(name)) is None:
            self._is_listed(name)  # raises StorageError if the whole bucket is missing
            raise DataError(f"{self.url_of(name)}: missing; {self._fix}")
        return content

    def read_or_none(self, name: str) -> bytes | None:
        """Reads an object; returns None if it is missing."""
        result = call_storage(self.url_of(name), self._objects.read(name).result, fix=self._fix)
        return result.value if result.state == "value" else None

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, uint8 `[N]`, with the bytes of an object from `start` on.

        Raises DataError if the object is missing or shorter.
        """
        url, folder = self.url_of(name), self.folder
        if folder is not None:
            found = call_storage(url, lambda: _read_file_into(folder / name, start, out), fix=self._fix)
        else:
            read = self._objects.read(name, byte_range=slice(start, start + len(out)))
            content = call_storage(url, read.result, fix=self._fix).value if len(out) else b""
            out[: len(content)] = np.frombuffer(content, np.uint8)
            found = len(content)
        if found != len(out):
            raise DataError(f"{url}: missing, or fewer than {start + len(out)} bytes; {self._fix}")

    def exists(self, name: str) -> bool:
        """Returns whether an object exists; raises StorageError if its bucket does not."""
        if self.folder is not None and any(path.is_file() for path in (self.folder, *self.folder.parents)):
            return False  # a file is where the folder or one of its parents should be: reading would fail

        def ask() -> bool:
            result = call_storage(self.url_of(name), self._objects.read(name, byte_range=slice(0, 0)).result)
            return result.state == "value" or self._is_listed(name)

        return ask_once("exists", self.url_of(name), ask)

    def list_names(self, prefix: str = "") -> list[str]:
        """Returns the sorted names of all objects that begin with `prefix`, relative to the store's URL."""
        begun = ts.KvStore.KeyRange(prefix, f"{prefix[:-1]}{chr(ord(prefix[-1]) + 1)}" if prefix else "")
        return sorted(name.decode() for name in call_storage(self.url, self._objects.list(begun).result))

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises DataError if an object is missing or its size in bytes differs; reads one byte of each."""

        def check_all() -> bool:
            with ThreadPoolExecutor(_CHECK_THREADS) as pool:
                list(pool.map(partial(self._read_end, max_bytes=1), sizes, sizes.values()))  # raises the first error
            return True

        ask_once("sizes", self.url, check_all)

    def write(self, name: str, content: bytes) -> None:
        """Writes an object; other readers see the old content or all of the new one."""
        call_storage(self.url_of(name), self._objects.write(name, content).result, writing=True)

    def start_read(self, name: str) -> ts.Future[ts.KvStore.ReadResult]:
        """Starts to read an object; the state of the result is "value" unless it is missing."""
        return self._objects.read(name)

    def start_write(self, name: str, content: bytes) -> ts.Future[ts.KvStore.TimestampedStorageGeneration]:
        """Starts to write an object."""
        return self._objects.write(name, content)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a new object; returns False if there is one with other content."""
        old = call_storage(self.url_of(name), self._objects.read(name).result)
        if old.state == "value":
            return old.value == content
        if self.replace(name, content, old.stamp.generation) is not None:
            return True
        return self.read_or_none(name) == content  # another process was faster, or the first try's answer was lost

    def generation(self, name: str) -> bytes:
        """Returns what changes whenever an object is written or deleted; there is one of missing objects, too."""
        result = call_storage(self.url_of(name), self._objects.read(name, byte_range=slice(0, 0)).result)
        return result.stamp.generation

    def replace(self, name: str, content: bytes | None, generation: bytes) -> bytes | None:
        """Replaces an object, or deletes it, if it still has a generation; returns the new one, None if it had another.

        It has another one, too, if the answer to a first try was lost.
        """
        write = self._objects.write(name, content, if_equal=generation)
        return call_storage(self.url_of(name), write.result, writing=True).generation or None

    def delete(self, name: str) -> None:
        """Deletes an object, if there is one."""
        call_storage(self.url_of(name), self._objects.write(name, None).result, writing=True)

    def delete_below(self, name: str) -> None:
        """Deletes all objects whose names begin with `name` and a slash."""
        below = ts.KvStore.KeyRange(f"{name}/", f"{name}0")  # "0" follows "/"
        call_storage(self.url_of(name), self._objects.delete_range(below).result, writing=True)

    def atomic_update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replaces the content of an object by `change(content)`; the content is None if the object is missing.

        If another process wrote the object in the meantime, `change` is called again with the newer content. If the
        response to a write is lost, `change` is called with its own result.
        """
        while True:
            old = call_storage(self.url_of(name), self._objects.read(name).result)
            content = change(old.value if old.state == "value" else None)
            if self.replace(name, content, old.stamp.generation) is not None:
                return

    def upload(self, folder: Path, *, last: Sequence[str] = (), resume: bool = False) -> None:
        """Copies all files of a local folder in parallel, and checks that each has arrived.

        The files in `last` are written in this order after all others: a reader that sees them can read all files.
        `resume` skips objects that exist with the same length and last bytes; use it only if the URL is derived from
        the content.
        """
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        existing = set(self.list_names()) if resume else set[str]()

        def copy(name: str) -> None:
            if name in existing and name not in last and self._has_arrived(name, files[name]):
                return
            self.write(name, call_storage(str(files[name]), files[name].read_bytes))
            if not self._has_arrived(name, files[name]):
                raise StorageError(
                    f"{self.url_of(name)}: does not hold what was just written; check that no other process writes "
                    "there, and start again"
                )

        with ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
            list(pool.map(copy, sorted(files.keys() - set(last))))  # after a failure, files not yet started are skipped
        for name in last:
            copy(name)

    def _is_listed(self, name: str) -> bool:
        """Returns whether a listing contains the name. S3 reports a missing bucket only when listing."""
        only_name = ts.KvStore.KeyRange(name, f"{name}\0")
        return bool(call_storage(self.url_of(name), self._objects.list(only_name).result))

    def _has_arrived(self, name: str, path: Path) -> bool:
        """Returns whether an object has the length and the last bytes of a file."""

        def read_file_end() -> tuple[int, bytes]:
            with path.open("rb") as file:
                size_bytes = file.seek(0, os.SEEK_END)
                file.seek(max(0, size_bytes - _COMPARED_BYTES))
                return size_bytes, file.read()

        size_bytes, end = call_storage(str(path), read_file_end)
        try:
            return self._read_end(name, size_bytes, _COMPARED_BYTES) == end
        except DataError:
            return False  # missing or of another length

    def _read_end(self, name: str, size_bytes: int, max_bytes: int) -> bytes:
        """Reads the last bytes of an object; DataError if the object is missing or not `size_bytes` long."""
        start, url = max(0, size_bytes - max_bytes), self.url_of(name)
        byte_range = slice(start, None) if start else None  # an empty object has no byte 0
        try:
            result = self._objects.read(name, byte_range=byte_range).result()
        except ValueError as error:
            if str(error).startswith("OUT_OF_RANGE"):
                raise DataError(f"{url}: fewer than {size_bytes} bytes; {self._fix}") from None
            raise classify_error(url, error, fix=self._fix) from None
        if result.state != "value":
            raise DataError(f"{url}: missing; {self._fix}")
        if (n_bytes := start + len(result.value)) != size_bytes:
            raise DataError(f"{url}: {n_bytes} bytes, expected {size_bytes}; {self._fix}")
        return result.value


def _read_file_into(path: Path, start: int, out: np.ndarray) -> int:
    """Returns the number of bytes read, fewer than `out` has if the file ends before."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        rest = memoryview(out)
        while rest and (count := file.readinto(rest[:_READ_BYTES])):
            rest = rest[count:]
    return len(out) - len(rest)
