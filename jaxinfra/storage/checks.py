"""Checks before long work begins that there is room for what it writes and that it may write there."""

import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from jaxinfra.errors import StorageError
from jaxinfra.storage.errors import storage_errors

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def free_bytes(folder: epath.PathLike) -> int:
    """Returns the bytes that are free on the disk of a local folder, which need not exist yet."""
    place = Path(os.path.abspath(folder))
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def check_space(folder: epath.PathLike, needed_bytes: int, *, purpose: str, fix: str) -> None:
    """Checks that the disk of `folder` has `needed_bytes` free; object stores always pass.

    Args:
        folder: local folder, which need not exist yet, or a URL.
        needed_bytes: what will be written, about.
        purpose: what needs it, for the message.
        fix: what to do beside freeing space.

    Raises:
        StorageError: there is less room than that.
    """
    if not is_remote(folder) and (free := free_bytes(folder)) < needed_bytes:
        raise StorageError(
            f"{folder}: {_size(free)} free, {purpose} needs about {_size(needed_bytes)}; free some space, or {fix}"
        )


def make_writable(folder: epath.PathLike) -> None:
    """Makes `folder` if it is missing and checks, by writing a file, that this process may write there.

    Raises:
        StorageError: it cannot be made or written.
    """
    with storage_errors(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        if not is_remote(folder):
            # Permission bits do not tell of a read-only or full file system, so write. The file has no name
            # that could stay behind.
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")


def is_remote(folder: epath.PathLike) -> bool:
    """Tells whether a folder is a URL of an object store."""
    return "://" in os.fspath(folder)


def _size(size_bytes: int) -> str:
    unit, name = next((each for each in _UNITS if size_bytes >= each[0]), (1, "bytes"))
    return f"{size_bytes / unit:,.1f} {name}"
