"""Small files that several hosts read, create and replace, in a folder that they share or in a bucket."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from jaxinfra.storage.atomic import create_file, delete_temporaries, write_bytes_atomic
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.location import is_remote
from jaxinfra.storage.objects import ObjectStore


class SharedFolder:
    """Stands in for an `ObjectStore` on a disk, where TensorStore locks files, which fails on NFS."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def list_names(self) -> Sequence[str]:
        """Returns the names of all files."""
        with storage_errors(self._folder, action="read"), suppress(FileNotFoundError):
            return os.listdir(self._folder)
        return ()

    def read_or_none(self, name: str) -> bytes | None:
        """Returns the content of a file; None if it is missing, b"" if something else is in its place."""
        path = self._folder / name
        with storage_errors(path, action="read"), suppress(FileNotFoundError):
            if path.is_file():
                return path.read_bytes()
            path.lstat()  # raises FileNotFoundError if there is nothing; else it is a folder or a pipe
            return b""
        return None

    def create(self, name: str, content: bytes) -> bool:
        """Writes a new file; returns False if there is one."""
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            return create_file(self._folder / name, content)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file; others see the old content or all of the new one."""
        with storage_errors(self._folder):
            write_bytes_atomic(self._folder / name, content)

    def delete(self, name: str) -> None:
        """Deletes a file, if there is one."""
        with storage_errors(self._folder), suppress(IsADirectoryError):
            (self._folder / name).unlink(missing_ok=True)

    def delete_temporaries(self, is_old: Callable[[str], bool]) -> None:
        """Deletes what kills have left of the files that `is_old` names."""
        with storage_errors(self._folder):
            delete_temporaries(self._folder, is_old)


type SharedFiles = ObjectStore | SharedFolder


def shared_files(where: str, folder: str, *, make: bool = False) -> SharedFiles:
    """Returns the files of a folder below a path or URL; `make` makes the folder if it is missing."""
    if is_remote(where):
        return ObjectStore(where).child(folder)
    path = Path(where, folder)
    if make:
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
    return SharedFolder(path)
