"""The folder of a model: a local one, one in a bucket, or a repository of the Hugging Face Hub."""

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import cast, override

import numpy as np

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.storage.background import ask_in_thread
from jaxinfra.storage.connection import retry_waits_s
from jaxinfra.storage.errors import storage_errors
from jaxinfra.storage.files import file_system
from jaxinfra.storage.objects import ObjectStore

PREFIX = "hf:"
"""Begins the source of published weights, in place of the directory of a run."""

FIX = "download or export it again"  # a folder that is damaged
# As the Hub checks names: ORG/NAME[@REVISION].
_HUB_NAME = re.compile(r"(?![^@]*(--|\.\.))\b[\w.-]+\b/\b[\w.-]{1,96}\b(@.+)?", re.ASCII)
_ANSWER_S, _SLOWEST = 60.0, 5_000  # an answer has this time, and a second more for each so many bytes
_PIECE_BYTES, _MAX_BYTES = 1 << 16, 1 << 28  # of a file that is read at once: a config, an index or a tokenizer


type ModelFolder = StoredFolder | UrlFolder | OverlaidFolder
"""The files of a model; all have methods of `ObjectStore`, which raise StorageError if the folder cannot be read."""


def is_published(source: str | os.PathLike[str]) -> bool:
    """Returns whether a source names published weights: `hf:DIR`, `hf:ORG/NAME`, `hf:s3://BUCKET/DIR`."""
    return os.fspath(source).startswith(PREFIX)


def open_folder(source: str) -> ModelFolder:
    """Opens the folder of a model.

    It is a local folder if there is one, `s3://` or `gs://`, another URL that fsspec reads, such as `https://`, or
    `ORG/NAME[@REVISION]` of the Hugging Face Hub. Raises ConfigError if there is no such folder.
    """
    place = source.removeprefix(PREFIX)
    if place.startswith(("s3://", "gs://")) or ("://" not in place and Path(place).expanduser().is_dir()):
        return StoredFolder(place, fix=FIX)
    if "://" in place:
        return UrlFolder(place, source)
    fix = "name the folder of a model, or ORG/NAME of the Hugging Face Hub"
    if _HUB_NAME.fullmatch(place):
        if not (parent := Path(place).parent).is_dir():
            return UrlFolder(f"hf://{place}", f"{source} (there is no folder {place} here)")
        fix = f"there is a folder {parent} here: name one in it, or {PREFIX}hf://{place} of the Hugging Face Hub"
    raise ConfigError(f"{source}: no such folder; {fix}")


class StoredFolder(ObjectStore):
    """A local folder, or one in a bucket; what is no file, such as a FIFO, is not read, which would have no end."""

    @override
    def exists(self, name: str) -> bool:
        return super().exists(self._file(name))

    @override
    def read_or_none(self, name: str) -> bytes | None:
        return super().read_or_none(self._file(name))

    def _file(self, name: str) -> str:
        """Returns the name; raises DataError if it is of something else than a file."""
        if os.path.exists(path := self.url_of(name)) and not os.path.isfile(path):
            raise DataError(f"{path}: is no file but a folder, a FIFO, a socket or a device; copy the model again")
        return name


class OverlaidFolder:
    """A folder of a model, of which another folder has some files in its place."""

    def __init__(self, below: ModelFolder, above: ModelFolder, names: Collection[str]):
        """`names` are those of the files that may be in the folder `above`."""
        self.url, self._below, self._above, self._names = below.url, below, above, frozenset(names)

    def _of(self, name: str) -> ModelFolder:
        return self._above if name in self._names and self._above.exists(name) else self._below

    def url_of(self, name: str) -> str:
        """Returns the URL of a file."""
        return self._of(name).url_of(name)

    def list_names(self) -> list[str]:
        """Returns the sorted names of the files and folders."""
        return sorted({*self._below.list_names(), *(name for name in self._names if self._above.exists(name))})

    def exists(self, name: str) -> bool:
        """Returns whether a file exists."""
        return self._of(name).exists(name)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises DataError if a file is missing or has another number of bytes."""
        for name, size in sizes.items():
            self._of(name).check_sizes({name: size})

    def generation(self, name: str) -> bytes:
        """Returns what changes when a file is replaced."""
        return self._of(name).generation(name)

    def read_or_none(self, name: str) -> bytes | None:
        """Reads a file; returns None if it is missing."""
        return self._of(name).read_or_none(name)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, uint8 `[N]`, with the bytes of a file from `start` on; DataError if it has fewer."""
        self._of(name).read_into(name, start, out)


class UrlFolder:
    """A folder behind a URL, such as a repository of the Hugging Face Hub, read in ranges without a copy on the disk.

    Of the Hub, `HF_ENDPOINT` names another server, and `HF_TOKEN` the user.
    """

    def __init__(self, url: str, source: str):
        """Opens a URL, which messages call `source`, as it was typed."""
        self.url, self._source = url.rstrip("/"), source
        self._files, self._path = file_system(self.url, field=PREFIX)
        if self.url.startswith("http"):
            from aiohttp import ClientTimeout  # which fsspec needs for such URLs

            limits = ClientTimeout(sock_connect=_ANSWER_S, sock_read=_ANSWER_S)  # the default ends all after 5 minutes
            self._files = type(self._files)(client_kwargs={"timeout": limits})
        self._is_open = False  # whether the server has answered
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the client warns of each request that it repeats

    def url_of(self, name: str) -> str:
        """Returns the URL of a file."""
        return f"{self.url}/{name}"

    def list_names(self) -> list[str]:
        """Returns the sorted names of the files and folders."""
        paths = self._ask(lambda: self._files.ls(self._path, detail=False))
        return sorted(path.rpartition("/")[2] for path in paths or [])

    def exists(self, name: str) -> bool:
        """Returns whether a file exists."""
        return self._ask(lambda: self._files.info(f"{self._path}/{name}")) is not None

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises DataError if a file is missing or has another number of bytes."""
        for name, expected in sizes.items():
            size = self._ask(partial(self._files.size, f"{self._path}/{name}"))
            if size != expected:
                raise DataError(f"{self.url_of(name)}: {size} bytes, expected {expected}; ask who uploaded it")

    def generation(self, name: str) -> bytes:
        """Returns what changes when a file is replaced."""
        return str(self._ask(lambda: self._files.ukey(f"{self._path}/{name}"))).encode()

    def read_or_none(self, name: str) -> bytes | None:
        """Reads a file; returns None if it is missing."""

        def read() -> bytes:
            content, begin_s = bytearray(), time.monotonic()
            # These two stream with block_size=0, and with a size they do not ask for it before.
            options = {"block_size": 0, "size": 1} if self.url.startswith(("http", "hf:")) else {}
            with _answer(lambda: self._files.open(f"{self._path}/{name}", "rb", **options), self._source) as file:
                while piece := _answer(lambda: file.read(_PIECE_BYTES), self._source, len(content), begin_s):
                    content += cast(bytes, piece)
                    if len(content) > _MAX_BYTES:
                        raise DataError(f"{self.url_of(name)}: has more than {_MAX_BYTES:,} bytes; {FIX}")
            return bytes(content)

        return self._ask(read, _MAX_BYTES)

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, uint8 `[N]`, with the bytes of a file from `start` on; DataError if it has fewer."""

        def read() -> bytes:
            options = {"mode": "rb", "cache_type": "none"}  # reads nothing ahead
            with self._files.open(f"{self._path}/{name}", **options) as file:
                file.seek(start)
                return cast(bytes, file.read(len(out)))

        content = self._ask(read, len(out)) or b""
        if len(content) != len(out):
            raise DataError(
                f"{self.url_of(name)}: {len(content)} bytes from {start} on instead of {len(out)}; try again"
            )
        out[:] = np.frombuffer(content, np.uint8)

    def _ask[T](self, ask: Callable[[], T], nbytes: int = 0) -> T | None:
        """Asks the server, again while it is busy or fails; None if it has no such file, ConfigError for a login."""
        waits_s, until_s = iter(retry_waits_s()), time.monotonic() + sum(retry_waits_s())  # clients wait, too
        while True:
            try:
                found = _answer(ask, self._source, nbytes)
                self._is_open = True
                return found
            except Exception as error:
                first = root = error  # clients say "no such file" for most failures: the cause is what happened
            while (status := _status(root)) is None and root.__cause__ is not None:
                root = root.__cause__
            is_missing = isinstance(first, FileNotFoundError) and isinstance(root, FileNotFoundError | ValueError)
            # S3 answers 403 if a file is missing to who may not list the others.
            if status in (404, 410) or (status is None and is_missing) or (status == 403 and self._is_open):
                return None
            if status in (401, 403):
                cause = f"no such model, or the server wants a login ({status})"
                raise ConfigError(f"{self._source}: {cause}; set HF_TOKEN, which only the Hub gets") from root
            is_lost = isinstance(root, TimeoutError | ConnectionResetError)
            # The Hub's client closes the connections of all threads if one thread finds no server.
            is_closed = isinstance(root, OSError) and root.errno == errno.EBADF
            is_busy = is_lost or is_closed or status in (408, 425, 429) or (status or 0) >= 500
            if not is_busy or time.monotonic() > until_s or (wait_s := next(waits_s, None)) is None:
                with storage_errors(self._source, action="read"):
                    raise root
            time.sleep(wait_s)


def _answer[T](ask: Callable[[], T], where: str, nbytes: int = 0, begin_s: float | None = None) -> T:
    """Returns the answer; raises StorageError if it takes longer than one of `nbytes` may."""
    limit_s, now_s = _ANSWER_S + nbytes / _SLOWEST, time.monotonic()
    answer = ask_in_thread(ask, (begin_s or now_s) + limit_s - now_s)
    if not answer.done():
        cause = f"no whole answer within {limit_s:.0f} s"
        raise StorageError(f"{where}: cannot be read: {cause}; start again when the server responds")
    return answer.result()


def _status(error: BaseException) -> int | None:
    """Returns the status of an answer that was an error for a client, aiohttp or that of the Hub."""
    return getattr(error, "status", getattr(getattr(error, "response", None), "status_code", None))
