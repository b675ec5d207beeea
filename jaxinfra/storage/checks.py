"""Checks before long work begins that there is room for what it writes and that it may write there."""

import os
import shutil
import tempfile
from pathlib import Path

from etils import epath
from rich.filesize import decimal

from jaxinfra.errors import StorageError
from jaxinfra.storage.errors import storage_errors


def check_space(folder: epath.PathLike, needed_bytes: int, *, purpose: str, fix: str) -> None:
    """Raises StorageError where the disk of `folder` has less than `needed_bytes` free; object stores always pass.

    The folder need not exist yet, or is a URL. `purpose` says what needs the room, `fix` what to do beside freeing
    some.
    """
    if is_remote(folder):
        return
    place = Path(os.path.abspath(folder))
    existing = next(each for each in (place, *place.parents) if each.exists())
    if (free := shutil.disk_usage(existing).free) < needed_bytes:
        raise StorageError(
            f"{folder}: {decimal(free)} free, {purpose} needs about {decimal(needed_bytes)}; free some space, or {fix}"
        )


def make_writable(folder: epath.PathLike) -> None:
    """Makes `folder` if it is missing; raises StorageError, found by writing a file, where this process may not."""
    with storage_errors(folder):
        epath.Path(folder).mkdir(parents=True, exist_ok=True)
        if not is_remote(folder):  # permission bits do not tell of a read-only or full file system, so write
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"\0")


def is_remote(folder: epath.PathLike) -> bool:
    """Tells whether a folder is a URL of an object store."""
    return "://" in os.fspath(folder)
