"""Output files of commands: checked before the long work, written atomically after it."""

import os
from pathlib import Path

from jaxinfra.errors import StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors

_FIX = "change its permissions or name another file"


def check_writable(path: Path) -> None:
    """Raises StorageError if a file cannot be written."""
    folder = path.absolute().parent
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name a file")
    if not folder.is_dir():
        raise StorageError(f"{path}: its folder does not exist; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: its folder is not writable; {_FIX}")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically; raises StorageError if that fails. Pipes and devices are written to directly."""
    with storage_errors(path, fix=_FIX):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            write_bytes_atomic(path.resolve(), text.encode())


def read_text(path: Path) -> str:
    """Reads a file; raises StorageError if that fails."""
    with storage_errors(path, action="read", fix=_FIX):
        return path.read_text(encoding="utf-8")
