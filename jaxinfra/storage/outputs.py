"""Files that a command writes when its long work is done: looked at before it begins, and never left half written.

What cannot be read or written is a StorageError.
"""

import os
from pathlib import Path

from jaxinfra.errors import StorageError
from jaxinfra.storage.atomic import write_bytes_atomic
from jaxinfra.storage.errors import storage_errors

_FIX = "mend it or name another file"


def check_writable(path: Path) -> None:
    """Raises StorageError for a file that cannot be written, before anything takes long."""
    folder = path.absolute().parent
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name a file")
    if not folder.is_dir():
        raise StorageError(f"{path}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: its folder cannot be written to; {_FIX}")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole, or leaves it as it was; what is no file (a pipe, `/dev/stdout`) is written to as it is."""
    with storage_errors(path, fix=_FIX):
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
        else:
            write_bytes_atomic(path.resolve(), text.encode())


def read_text(path: Path) -> str:
    """Returns the text of a file."""
    with storage_errors(path, action="read", fix=_FIX):
        return path.read_text(encoding="utf-8")
