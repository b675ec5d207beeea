"""Copies the files of a local folder into a bucket, in a thread, so that writers of files need not know of buckets.

A bucket cannot append to an object. So a `.jsonl` file is stored in parts of about 1 MiB, `metrics.jsonl`,
`metrics.jsonl.1` and so on, of which only the last changes while the file grows. Other files are stored whole: a large
one less often, so that its copies take at most 1 MiB/s.

Objects are replaced and deleted by conditional writes: the owner of a run that has lost its lease during a round of
copies does not overwrite what the new owner has written, however late its request arrives.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import override

from jaxinfra.errors import JaxinfraError, StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.closing import ClosedOnExit
from jaxinfra.storage.connection import require_server
from jaxinfra.storage.objects import ObjectStore

SYNC_S = 10.0
"""Seconds between two rounds of copies."""

_PART_BYTES = 1 << 20
_BYTES_PER_S = 1 << 20  # of copies of one file

_log = logging.getLogger(__name__)


def fetch(url: str, names: Sequence[str], folder: Path) -> list[str]:
    """Copies files of a bucket, with all their parts, into a local folder; returns those that are not missing."""
    require_server(url)  # before the store is opened, which looks for credentials, and prints where it finds none
    store, found = ObjectStore(url), list[str]()
    for name in names:
        parts = list[bytes]()
        while (content := store.read_or_none(_part_name(name, len(parts)))) is not None:
            parts.append(content)
            if not _is_parted(name):
                break
        if parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(folder / name, b"".join(parts))
            found.append(name)
    return found


@dataclass
class _Copied:
    """The copy of one file in the bucket."""

    stamp: tuple[int, int, int] | None = None  # inode, size and time of change of the file when it was copied
    parts: tuple[int, ...] = (0,)  # start of each part in the file
    copied_s: float = float("-inf")  # when the copy started


class Mirror(ClosedOnExit):
    """Copies the files of a folder, apart from hidden ones, into a store until it is closed; a context manager.

    Args:
        folder: the local folder, all of whose files are copied.
        store: where to.
        check: is called before each round, and before an object is replaced that is not known to be unchanged; if it
            raises, nothing is copied.
        fetched: files of the folder that are from the store; like copied ones, they are deleted there when they are
            deleted here.
    """

    def __init__(
        self,
        folder: Path,
        store: ObjectStore,
        check: Callable[[], None] = lambda: None,
        fetched: Iterable[str] = (),
    ) -> None:
        self._folder, self._store, self._check = folder, store, check
        self._copied = {name: _Copied() for name in fetched}
        self._generations: dict[str, bytes] = {}  # of the objects, as this mirror has left them
        self._lock = threading.Lock()  # `sync` may be called by several threads
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sync_regularly, name="mirror", daemon=True)
        self._thread.start()

    def sync(self, *, all_files: bool = True) -> None:
        """Copies what has changed; without `all_files`, not the large files that were copied a short while ago.

        Raises StorageError if the bucket cannot be written; the next call tries again.
        """
        with self._lock:
            self._check()
            paths = {path.relative_to(self._folder).as_posix(): path for path in sorted(self._folder.rglob("*"))}
            files = {name: path for name, path in paths.items() if path.is_file() and "/." not in f"/{name}"}
            for name in self._copied.keys() - files.keys():
                if _is_parted(name):
                    self._delete_parts(name, 1)
                self._replace(name, None)
                del self._copied[name]
            for name, path in files.items():
                with suppress(FileNotFoundError):  # deleted since it was listed
                    self._copy(name, path, all_files=all_files)

    @override
    def close(self) -> None:
        """Ends the thread and copies what has changed; raises StorageError if that fails."""
        self._ended.set()
        self._thread.join()
        self.sync()

    def _copy(self, name: str, path: Path, *, all_files: bool) -> None:
        status = path.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        known = self._copied.get(name, _Copied())
        now_s = time.monotonic()
        too_early = not _is_parted(name) and now_s < known.copied_s + status.st_size / _BYTES_PER_S
        if stamp == known.stamp or (too_early and not all_files):
            return
        if not _is_parted(name):
            self._replace(name, path.read_bytes())
            self._copied[name] = _Copied(stamp, copied_s=now_s)
            return
        grows = known.stamp is not None and known.stamp[0] == stamp[0] and known.stamp[1] <= stamp[1]
        if not grows:
            self._copied[name] = known = _Copied()  # also if what follows fails half-way
        starts = list(known.parts)
        with path.open("rb") as file:
            file.seek(starts[-1])
            content = file.read()
        while True:
            end = content.rfind(b"\n", 0, _PART_BYTES) + 1 if len(content) > _PART_BYTES else 0
            self._replace(_part_name(name, len(starts) - 1), content[:end] if end else content)
            if not end:
                break
            content = content[end:]
            starts.append(starts[-1] + end)
        if not grows:  # the parts of a longer file that this one replaces
            self._delete_parts(name, len(starts))
        self._copied[name] = _Copied(stamp, tuple(starts), now_s)

    def _delete_parts(self, name: str, first: int) -> None:
        """Deletes the parts of a file from number `first` on, the last one first: a failure leaves no gap."""
        suffixes = [part.removeprefix(f"{name}.") for part in self._store.list_names(f"{name}.")]
        numbers = [int(suffix) for suffix in suffixes if suffix.isascii() and suffix.isdecimal()]
        for number in sorted(numbers, reverse=True):
            if number >= first:
                self._replace(_part_name(name, number), None)

    def _replace(self, name: str, content: bytes | None) -> None:
        """Replaces or deletes an object; raises the error of `check` if another process may have written it."""
        while True:
            if name not in self._generations:
                self._generations[name] = self._store.generation(name)
                self._check()  # a later owner writes another generation
            generation = self._store.replace(name, content, self._generations.pop(name))
            if generation is not None:  # else another process has written it, or an answer was lost
                self._generations[name] = generation
                return

    def _sync_regularly(self) -> None:
        """The thread: reports the first of several failures in a row."""
        failed = False
        while not self._ended.wait(SYNC_S):
            try:
                self.sync(all_files=False)
                failed = False
            except StorageError as error:
                if not failed:
                    _log.warning("%s; training goes on, the files are copied when that works", error)
                failed = True
            except JaxinfraError:  # the lease is lost, which ends the run
                return


def _is_parted(name: str) -> bool:
    return name.endswith(".jsonl")


def _part_name(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name
