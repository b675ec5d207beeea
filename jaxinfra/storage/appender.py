"""Appends records to a local file so that neither a kill nor a full disk leaves half a record before a whole one."""

import os
from collections import deque
from pathlib import Path

from jaxinfra.errors import StorageError

_WAITING = 10_000  # records, about 3 MB of host memory at 300 bytes each


class Appender:
    """Appends records to a file, without a buffer: what `append` has written survives the process.

    While the disk is full, records wait in memory and go first when it can be written again, in order. Of
    more than 10,000 that wait the oldest are dropped and counted in `dropped`.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, made if it is not there; raises OSError where it cannot be opened."""
        self.dropped, self._path = 0, path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._size_bytes = os.fstat(self._fd).st_size
        self._waiting: deque[bytes] = deque()

    def append(self, record: bytes) -> None:
        """Writes the records that wait, then this one. All wait for the next call where that raises OSError."""
        if len(self._waiting) == _WAITING:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append(record)
        self._write()

    def close(self) -> None:
        """Writes what waits and closes the file; StorageError says how many records were lost."""
        try:
            self._write()
        except OSError:
            self.dropped += len(self._waiting)
        finally:
            os.close(self._fd)
        if self.dropped:
            raise StorageError(f"{self._path}: {self.dropped} records lost to a full disk; free space there")

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
