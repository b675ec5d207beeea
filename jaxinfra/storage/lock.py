"""Locks a folder, so that only one process works in it; the lock ends with the process, however it ends."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PATIENCE_S = 0.2  # `is_locked` of another process takes the lock for a moment


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Locks an existing folder within this context; yields False if another process holds its lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline_s = time.monotonic() + _PATIENCE_S
        while not (acquired := _acquire(descriptor, fcntl.LOCK_EX)) and time.monotonic() < deadline_s:
            time.sleep(0.05)
        yield acquired
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Tells whether a process holds the lock of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        return not _acquire(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
