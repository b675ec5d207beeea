"""Places that hold named objects, all through TensorStore: a folder, `s3://bucket/prefix`, `gs://bucket/prefix`.

It knows nothing of what the objects are. Invariants: an object is there whole or not at all; whoever cannot reach the
place fails within the budget for retries, in one line that names the URL.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tensorstore as ts

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.storage.connection import kvstore_spec, normalize_url, tensorstore_context
from jaxinfra.storage.errors import DAMAGED_VERSION_FIX, call_storage, classify_error

_UPLOADS = 8  # files at once, each of which is in memory: of tokens, shards of 32 or 64 MiB
_END_BYTES = 256


class ObjectStore:
    """One place; safe to use from many threads.

    All that asks the place raises StorageError where that cannot be read or written.
    """

    def __init__(self, url: str | Path):
        """Looks at the URL, nothing is asked of the place itself; ConfigError for another one, or credentials in it."""
        self.url = normalize_url(str(url))
        spec = kvstore_spec(self.url)
        try:
            self._objects = ts.KvStore.open(spec, context=tensorstore_context()).result()
        except ValueError as error:
            raise ConfigError(f"{self.url}: {error}; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX") from None

    @property
    def folder(self) -> Path | None:
        """The folder of a place on this machine; None of a bucket."""
        return None if "://" in self.url else Path(self.url)

    def url_of(self, name: str) -> str:
        """The URL of an object: for messages, and for arrays."""
        return f"{self.url}/{name}"

    def child(self, name: str) -> "ObjectStore":
        """The place of that name below this one."""
        child = object.__new__(ObjectStore)
        child.url = self.url_of(name)
        child._objects = self._objects.copy()
        child._objects.path = f"{self._objects.path}{name}/"
        return child

    def read(self, name: str) -> bytes:
        """Returns a whole object; raises DataError where it is missing."""
        found = call_storage(self.url_of(name), self._objects.read(name).result)
        if found.state != "value":
            self._listed(name)
            raise DataError(f"{self.url_of(name)}: missing; {DAMAGED_VERSION_FIX}")
        return found.value

    def exists(self, name: str) -> bool:
        """Tells whether there is an object of that name; there is none below a file. No bucket is a StorageError."""
        if self.folder is not None and any(map(os.path.isfile, (self.folder, *self.folder.parents))):
            return False
        found = call_storage(self.url_of(name), self._objects.read(name, byte_range=slice(0, 0)).result)
        return found.state == "value" or self._listed(name)

    def list_names(self) -> list[str]:
        """All objects at and below this place, by their names relative to it, sorted."""
        return sorted(name.decode() for name in call_storage(self.url, self._objects.list().result))

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises DataError for an object that is missing or of another size in bytes; of each, one byte is read."""
        for read in [self._ask_end(name, size_bytes, 1) for name, size_bytes in sizes.items()]:
            read()

    def write(self, name: str, content: bytes) -> None:
        """Writes an object: who reads it finds all of it or, as before, nothing of it."""
        call_storage(self.url_of(name), self._objects.write(name, content).result, writing=True)

    def atomic_update(self, name: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replaces an object by what is made of it; when another process was faster, that is changed in its turn.

        `change` takes what is there, None if nothing is, to what shall be there. It may be called again, and on what it
        made itself, if the answer to a write is lost.
        """
        while True:
            found = call_storage(self.url_of(name), self._objects.read(name).result)
            content = change(found.value if found.state == "value" else None)
            write = self._objects.write(name, content, if_equal=found.stamp.generation)
            if call_storage(self.url_of(name), write.result, writing=True).generation:
                return

    def delete(self, name: str) -> None:
        """Removes an object, if there is one."""
        call_storage(self.url_of(name), self._objects.write(name, None).result, writing=True)

    def upload(self, folder: Path, *, last: Sequence[str] = (), resume: bool = False) -> None:
        """Copies all files of a local folder, many at once, and looks whether each has arrived.

        The names in `last` are written when all others have arrived, in this order: who sees them sees all. With
        `resume` what is there with the same length and end is not written again; for places that are named by what is
        in them.
        """
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        there = set(self.list_names()) if resume else set[str]()

        def copy(name: str) -> None:
            if name not in there or name in last or not self._arrived(name, files[name]):
                self.write(name, call_storage(str(files[name]), files[name].read_bytes, writing=True))
                if not self._arrived(name, files[name]):
                    raise StorageError(
                        f"{self.url_of(name)}: does not hold what was just written; check that no other process writes "
                        "there, and start again"
                    )

        with ThreadPoolExecutor(_UPLOADS) as pool:
            list(pool.map(copy, sorted(files.keys() - set(last))))  # what has not begun is left out when one fails
        for name in last:
            copy(name)

    def _listed(self, name: str) -> bool:
        """Whether a listing has the name; that there is no such bucket, S3 says in a listing alone."""
        alone = ts.KvStore.KeyRange(name, f"{name}\0")
        return bool(call_storage(self.url_of(name), self._objects.list(alone).result))

    def _arrived(self, name: str, path: Path) -> bool:
        """Whether an object is as long as a file, and ends as it does."""
        size_bytes, end = call_storage(str(path), lambda: _read_tail(path), writing=True)
        try:
            return self._ask_end(name, size_bytes, len(end))() == end
        except DataError:
            return False  # it is missing, or of another length

    def _ask_end(self, name: str, size_bytes: int, at_most: int) -> Callable[[], bytes]:
        """Asks for the last bytes of an object: what is returned waits for them, and fails if it has another length."""
        start = max(0, size_bytes - at_most)
        future = self._objects.read(name, byte_range=slice(start, None) if start else None)
        where = self.url_of(name)

        def read() -> bytes:
            try:
                found = future.result()
            except ValueError as error:
                if str(error).startswith("OUT_OF_RANGE"):
                    raise DataError(f"{where}: fewer than {size_bytes} bytes; {DAMAGED_VERSION_FIX}") from None
                raise classify_error(where, error) from None
            if found.state != "value":
                raise DataError(f"{where}: missing; {DAMAGED_VERSION_FIX}")
            if (n_bytes := start + len(found.value)) != size_bytes:
                raise DataError(f"{where}: {n_bytes} bytes, not {size_bytes}; {DAMAGED_VERSION_FIX}")
            return found.value

        return read


def _read_tail(path: Path) -> tuple[int, bytes]:
    """How long a file is, and its last bytes."""
    with path.open("rb") as file:
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - _END_BYTES))
        return size_bytes, file.read()
