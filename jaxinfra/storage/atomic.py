"""Puts local files and folders into place whole or not at all, whatever ends the process, and durably.

Not for checkpoints, which have a manifest, and not for object stores, which replace whole objects anyway.
"""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Gives a temporary file that takes the place of `path` once it is written and synced.

    Where an OSError prevents it, `path` is unchanged and nothing is left beside it.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replaces a file by `data`; see `atomic_file`."""
    with open_atomic(path) as file:
        file.write(data)


def move_folder(folder: Path, target: Path) -> bool:
    """Syncs a folder with all in it and renames it; tells whether one rename could do that.

    It cannot from another disk, nor over a folder that is not empty; both are then unchanged. Other failures: OSError.
    """
    for path in folder.rglob("*"):
        _sync(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    _sync(target.parent)
    return True


def _sync(path: Path) -> None:
    """Makes a file durable, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
