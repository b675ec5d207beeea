"""Local files that no kill and no full disk leaves half written: replaced whole, or appended to by records.

Not for checkpoints, which have a manifest, and not for object stores, which replace whole objects anyway.
"""

import contextlib
import os
import tempfile
from collections import deque
from pathlib import Path

_WAITING = 10_000  # records, about 3 MB of host memory at 300 bytes each


class Appender:
    """Appends records to a file, without a buffer: what `append` has written survives the process.

    While the disk is full, records wait in memory and go first when it can be written again, in order. Of
    more than 10,000 that wait the oldest are dropped and counted in `dropped`.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, made if it is not there.

        Raises:
            OSError: it cannot be opened.
        """
        self.dropped = 0
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size_bytes = os.fstat(self._fd).st_size
        self._waiting: deque[bytes] = deque()

    def append(self, record: bytes) -> None:
        """Writes the records that wait, then this one.

        Raises:
            OSError: they could not be written now; they wait for the next call.
        """
        if len(self._waiting) == _WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(record)
        self._write()

    def close(self) -> int:
        """Writes what waits, closes the file, and returns how many records were lost in all."""
        try:
            self._write()
        except OSError:
            self.dropped += len(self._waiting)
        finally:
            os.close(self._fd)
        return self.dropped

    def _write(self) -> None:
        data = b"".join(self._waiting)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._size_bytes)  # half a record must not stand before a whole one
            raise
        self._size_bytes += len(data)
        self._waiting.clear()


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, syncs it and renames it over `path`.

    Raises:
        OSError: no space, no permission; `path` is then unchanged and nothing is left beside it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder as durable as the files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
