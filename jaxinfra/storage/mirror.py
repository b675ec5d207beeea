"""Copies the files of a local folder into a bucket, in a thread, so that writers of files need not know of buckets.

A bucket cannot append to an object. So a `.jsonl` file is stored in parts of about 1 MiB, `metrics.jsonl`,
`metrics.jsonl.1` and so on, of which only the last changes while the file grows. Other files are stored whole: a large
one less often, so that its copies take at most 1 MiB/s.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import override

from jaxinfra.errors import JaxinfraError, StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.closing import ClosedOnExit
from jaxinfra.storage.objects import ObjectStore

SYNC_S = 10.0
"""Seconds between two rounds of copies."""

_PART_BYTES = 1 << 20
_BYTES_PER_S = 1 << 20  # of copies of one file

_log = logging.getLogger(__name__)


def fetch(store: ObjectStore, names: Sequence[str], folder: Path) -> None:
    """Copies files of a bucket, with all their parts, into a local folder; those that are missing are left out."""
    for name in names:
        if (content := store.read_or_none(name)) is None:
            continue
        if name.endswith(".jsonl"):
            content += b"".join(part for _, part in _later_parts(store, name))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes_atomic(path, content)


def _later_parts(store: ObjectStore, name: str) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of the parts of a file after the first."""
    for number in itertools.count(1):
        if (content := store.read_or_none(part := _part_name(name, number))) is None:
            return
        yield part, content


@dataclass
class _Copied:
    """The copy of one file in the bucket.

    Attributes:
        stamp: inode, size and time of change of the file when it was copied.
        parts: start of each part in the file.
        copied_s: when the copy started.
    """

    stamp: tuple[int, int, int] | None = None
    parts: tuple[int, ...] = (0,)
    copied_s: float = float("-inf")


class Mirror(ClosedOnExit):
    """Copies the files of a folder, apart from hidden ones, into a store until it is closed; a context manager.

    Args:
        folder: the local folder, all of whose files are copied.
        store: where to.
        check: is called before each round; if it raises, nothing is copied.
    """

    def __init__(self, folder: Path, store: ObjectStore, check: Callable[[], None] = lambda: None) -> None:
        self._folder, self._store, self._check = folder, store, check
        self._copied: dict[str, _Copied] = {}
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
                self._store.delete(name)
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
        is_parted = name.endswith(".jsonl")
        too_early = not is_parted and now_s < known.copied_s + status.st_size / _BYTES_PER_S
        if stamp == known.stamp or (too_early and not all_files):
            return
        if not is_parted:
            self._store.write(name, path.read_bytes())
            self._copied[name] = _Copied(stamp, copied_s=now_s)
            return
        grows = known.stamp is not None and known.stamp[0] == stamp[0] and known.stamp[1] <= stamp[1]
        starts = list(known.parts) if grows else [0]
        with path.open("rb") as file:
            file.seek(starts[-1])
            content = file.read()
        while True:
            end = content.rfind(b"\n", 0, _PART_BYTES) + 1 if len(content) > _PART_BYTES else 0
            self._store.write(_part_name(name, len(starts) - 1), content[:end] if end else content)
            if not end:
                break
            content = content[end:]
            starts.append(starts[-1] + end)
        if not grows:  # the parts of a longer file that this one replaces
            for number in itertools.count(len(starts)):
                if self._store.read_or_none(part := _part_name(name, number)) is None:
                    break
                self._store.delete(part)
        self._copied[name] = _Copied(stamp, tuple(starts), now_s)

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


def _part_name(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name
