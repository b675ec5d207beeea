"""Checks, before long work starts, that its output folder is writable and has enough free space."""

import os
import shutil
import stat
import tempfile
from pathlib import Path

from rich.filesize import decimal

from jaxinfra.errors import StorageError
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.location import is_remote


def check_space(folder: str | os.PathLike[str], needed_bytes: int, *, purpose: str, fix: str) -> None:
    """Raises StorageError if the disk of `folder` has less than `needed_bytes` free.

    The folder need not exist yet. A URL always passes: object stores do not report free space. The message says what
    needs the space (`purpose`) and what to do instead of freeing some (`fix`).
    """
    if is_remote(folder):
        return
    path = Path(os.path.abspath(folder))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    with storage_errors(existing):
        free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise StorageError(
            f"{folder}: {decimal(free)} free, {purpose} needs about {decimal(needed_bytes)}; free some space, or {fix}"
        )


def make_private(folder: Path) -> None:
    """Creates a folder for this user alone; raises StorageError if another user may change it, or what is in it."""
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(0o700, exist_ok=True)
        found, above = folder.lstat(), folder.parent.stat()
    me = os.geteuid()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == me and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    is_safe_above = above.st_mode & stat.S_ISVTX or (above.st_uid in (0, me) and not above.st_mode & stat.S_IWOTH)
    if not is_ours or not is_safe_above:
        raise StorageError(f"{folder}: another user may write to it or to the folder above; name a folder of your own")


def make_writable(folder: str | os.PathLike[str]) -> None:
    """Creates `folder` if it is missing; raises StorageError if this process cannot write to it."""
    with storage_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Permission bits do not show a read-only or full file system; writing a file does.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
