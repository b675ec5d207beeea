"""The folder of a model: a local one, one in a bucket, or a repository of the Hugging Face Hub."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, cast, override

import numpy as np

from jaxinfra.errors import ConfigError, DataError
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.files import file_system
from jaxinfra.storage.objects import ObjectStore

_STORES = ("s3://", "gs://")
PREFIX = "hf:"
"""Begins the source of published weights, in place of the directory of a run."""


class ModelFolder(Protocol):
    """The files of a model.

    Methods raise StorageError if the folder cannot be read.
    """

    url: str

    def url_of(self, name: str) -> str:
        """Returns the URL or path of a file."""
        ...

    def names(self) -> list[str]:
        """Returns the names of all files."""
        ...

    def exists(self, name: str) -> bool:
        """Returns whether a file exists."""
        ...

    def check_size(self, name: str, nbytes: int) -> None:
        """Raises DataError if a file is missing or has another number of bytes."""
        ...

    def version(self, name: str) -> str:
        """Returns what changes when a file is replaced."""
        ...

    def read_or_none(self, name: str) -> bytes | None:
        """Reads a file; returns None if it is missing."""
        ...

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, uint8 `[N]`, with the bytes of a file from `start` on; DataError if it has fewer."""
        ...


def is_published(source: str | os.PathLike[str]) -> bool:
    """Returns whether a source names published weights: `hf:DIR`, `hf:ORG/NAME`, `hf:s3://BUCKET/DIR`."""
    return os.fspath(source).startswith(PREFIX)


def open_folder(source: str) -> ModelFolder:
    """Opens the folder of a model.

    It is a local folder if there is one, `s3://` or `gs://`, another URL that fsspec reads, such as `https://`, or
    `ORG/NAME[@REVISION]` of the Hugging Face Hub. Raises ConfigError if there is no such folder.
    """
    source = source.removeprefix(PREFIX)
    if "://" in source:
        return StoredFolder(ObjectStore(source)) if source.startswith(_STORES) else UrlFolder(source)
    if Path(source).expanduser().is_dir():
        return StoredFolder(ObjectStore(source))
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return UrlFolder(f"hf://{source}")
    raise ConfigError(f"{source}: no such folder; name the folder of a model, or ORG/NAME of the Hugging Face Hub")


class StoredFolder(ModelFolder):
    """A local folder, or one in a bucket."""

    def __init__(self, objects: ObjectStore):
        self._objects, self.url = objects, objects.url

    @override
    def url_of(self, name: str) -> str:
        return self._objects.url_of(name)

    @override
    def names(self) -> list[str]:
        return [name for name in self._objects.list_names() if "/" not in name]

    @override
    def exists(self, name: str) -> bool:
        return self._objects.exists(name)

    @override
    def check_size(self, name: str, nbytes: int) -> None:
        self._objects.check_sizes({name: nbytes})

    @override
    def version(self, name: str) -> str:
        return self._objects.generation(name).hex()

    @override
    def read_or_none(self, name: str) -> bytes | None:
        return self._objects.read_or_none(name)

    @override
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        self._objects.read_into(name, start, out)


class UrlFolder(ModelFolder):
    """A folder behind a URL, such as a repository of the Hugging Face Hub, read in ranges without a copy on the disk.

    Of the Hub, `HF_ENDPOINT` names another server, and `HF_TOKEN` the user.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._files, self._path = file_system(self.url, field=PREFIX)

    @override
    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    @override
    def names(self) -> list[str]:
        with self._errors():
            paths = self._files.ls(self._path, detail=False)
        return sorted(path.rpartition("/")[2] for path in paths)

    @override
    def exists(self, name: str) -> bool:
        with self._errors():
            return self._files.exists(f"{self._path}/{name}")

    @override
    def check_size(self, name: str, nbytes: int) -> None:
        with self._errors():
            size = self._files.size(f"{self._path}/{name}")
        if size != nbytes:
            raise DataError(f"{self.url_of(name)}: {size} bytes, expected {nbytes}; ask who uploaded it")

    @override
    def version(self, name: str) -> str:
        with self._errors():
            return str(self._files.ukey(f"{self._path}/{name}"))

    @override
    def read_or_none(self, name: str) -> bytes | None:
        if not self.exists(name):
            return None
        with self._errors():
            return cast(bytes, self._files.cat_file(f"{self._path}/{name}"))

    @override
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        options = {"mode": "rb", "cache_type": "none"}  # reads nothing ahead
        with self._errors(), self._files.open(f"{self._path}/{name}", **options) as file:
            file.seek(start)
            content = cast(bytes, file.read(len(out)))
        if len(content) != len(out):
            raise DataError(
                f"{self.url_of(name)}: {len(content)} bytes from {start} on instead of {len(out)}; try again"
            )
        out[:] = np.frombuffer(content, np.uint8)

    def _errors(self) -> AbstractContextManager[None]:
        missing = f"{self.url}: there is no such model, or you may not read it; check its name, and HF_TOKEN"
        return storage_errors(self.url, action="read", missing=missing)
