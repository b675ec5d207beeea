"""Writes and moves local files and folders atomically and durably: all of it or nothing, whatever ends the process."""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".tmp"
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` on exit, once it is written and synced.

    If anything raises, `path` is unchanged and the temporary file is deleted.
    """
    handle, temporary = _create_temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _fsync(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replaces a file by `data` atomically."""
    with open_atomic(path) as file:
        file.write(data)


def read_file(path: Path) -> bytes:
    """Reads a file; raises OSError for what is none, such as a named pipe, where a read would never end."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return path.read_bytes()


def create_file(path: Path, data: bytes, mode: int = 0o644) -> bool:
    """Creates a file with `data`, all at once; returns False if there is one. Holds on network file systems, too."""
    handle, temporary = _create_temporary(path, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
        # Over NFS, the answer to a link that succeeded may be lost, and the next try then fails.
        return os.stat(temporary).st_nlink == 2
    finally:
        os.unlink(temporary)


def _create_temporary(path: Path, mode: int = 0o644) -> tuple[int, Path]:
    """Creates a temporary file beside `path`, with a mode that the umask limits; returns its descriptor and path."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
    return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), temporary


def delete_temporaries(folder: Path, is_left: Callable[[str], bool] = lambda name: True) -> None:
    """Deletes the temporary files that kills have left in a folder; `is_left` says of which files nobody writes one."""
    for name in os.listdir(folder):
        if (found := _TEMPORARY.fullmatch(name)) and is_left(found[1]) and (folder / name).is_file():
            (folder / name).unlink(missing_ok=True)


def move_folder(folder: Path, target: Path) -> bool:
    """Syncs a folder and everything in it, then renames it to `target`.

    Returns False, with nothing changed, if the target is on another disk or is a folder that is not empty. Other
    failures raise OSError.
    """
    for path in folder.rglob("*"):
        _fsync(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    _fsync(target.parent)
    return True


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
