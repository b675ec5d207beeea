"""Appends records to a local file. After a kill or a full disk, at most the last record is incomplete."""

import os
from collections import deque
from pathlib import Path

from jaxinfra.errors import StorageError

_MAX_PENDING = 10_000  # records, about 3 MB of host memory at 300 bytes each


class Appender:
    """Appends records to a file without a buffer: what `append` has written survives the process.

    While the disk is full, records wait in memory; the next write that succeeds writes them first, in order. When
    10,000 wait, the oldest is dropped and counted in `dropped`.
    """

    def __init__(self, path: Path) -> None:
        """Opens or creates `path`, and ends a record that a kill has torn; raises OSError if that fails."""
        self.dropped, self._path = 0, path
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._size_bytes = os.fstat(self._fd).st_size
        is_torn = self._size_bytes and os.pread(self._fd, 1, self._size_bytes - 1) != b"\n"
        self._pending = deque([b"\n"] if is_torn else [])

    def append(self, record: bytes) -> None:
        """Writes the pending records, then this one. If that raises OSError, all of them stay pending."""
        if len(self._pending) == _MAX_PENDING:
            self._pending.popleft()
            self.dropped += 1
        self._pending.append(record)
        self._write()

    def close(self) -> None:
        """Writes the pending records and closes the file; raises StorageError if any records were lost."""
        try:
            self._write()
        except OSError:
            self.dropped += len(self._pending)
        finally:
            os.close(self._fd)
        if self.dropped:
            raise StorageError(f"{self._path}: {self.dropped} records lost because the disk is full; free some space")

    def abandon(self) -> None:
        """Closes the file without the pending records."""
        os.close(self._fd)

    def _write(self) -> None:
        data = b"".join(self._pending)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError:
            os.ftruncate(self._fd, self._size_bytes)  # removes the half record
            raise
        self._size_bytes += len(data)
        self._pending.clear()
