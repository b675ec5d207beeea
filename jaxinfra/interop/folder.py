"""The folder of a model: a local one, one in a bucket, or a repository of the Hugging Face Hub."""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, override

import numpy as np

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.packages import import_optional
from jaxinfra.storage.objects import ObjectStore

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
    """Opens the folder of a model: a local folder if there is one, a bucket, or `ORG/NAME[@REVISION]` of the Hub.

    Raises ConfigError if there is no such folder.
    """
    source = source.removeprefix(PREFIX)
    if "://" in source:
        return StoredFolder(ObjectStore(source))
    if Path(source).expanduser().is_dir():
        return StoredFolder(ObjectStore(source))
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return HubFolder(source)
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
    def read_or_none(self, name: str) -> bytes | None:
        return self._objects.read_or_none(name)

    @override
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        self._objects.read_into(name, start, out)


class HubFolder(ModelFolder):
    """A repository of the Hugging Face Hub, read in ranges without a copy on the disk.

    `HF_ENDPOINT` names another server, `HF_TOKEN` the user.
    """

    def __init__(self, repository: str):
        self.url = f"hf://{repository}"
        self._hub = import_optional("huggingface_hub", needed_by=f"hf:{repository}", install="jaxinfra[huggingface]")

    @cached_property
    def _files(self) -> Any:
        return self._hub.HfFileSystem()

    @override
    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    @override
    def names(self) -> list[str]:
        paths = self._call(lambda: self._files.ls(self.url, detail=False))
        return sorted(path.rpartition("/")[2] for path in paths)

    @override
    def exists(self, name: str) -> bool:
        return self._call(lambda: self._files.exists(self.url_of(name)))

    @override
    def check_size(self, name: str, nbytes: int) -> None:
        if (size := self._call(lambda: self._files.info(self.url_of(name)))["size"]) != nbytes:
            raise DataError(f"{self.url_of(name)}: {size} bytes, expected {nbytes}; ask who uploaded it")

    @override
    def read_or_none(self, name: str) -> bytes | None:
        return self._call(lambda: self._files.cat_file(self.url_of(name))) if self.exists(name) else None

    @override
    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        content = self._call(lambda: self._files.cat_file(self.url_of(name), start=start, end=start + len(out)))
        if len(content) != len(out):
            raise StorageError(f"{self.url_of(name)}: {len(content)} bytes instead of {len(out)}; try again")
        out[:] = np.frombuffer(content, np.uint8)

    def _call[T](self, call: Callable[[], T]) -> T:
        try:
            return call()
        except FileNotFoundError:
            raise ConfigError(
                f"{self.url}: there is no such model, or HF_TOKEN may not read it; check its name"
            ) from None
        except (OSError, self._hub.errors.HfHubHTTPError) as error:
            cause = str(error).partition("\n")[0]
            raise StorageError(f"{self.url}: {cause}; check the network, HF_ENDPOINT and HF_TOKEN") from None
