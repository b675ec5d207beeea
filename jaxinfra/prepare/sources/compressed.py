"""Reads .gz and .zst files as what they hold, in a stream. What is cut short or damaged is an error, never an end."""

import gzip
import io
import zlib
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast, override

import zstandard

from jaxinfra.prepare.sources.files import damaged
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import opened, shown

_FEED_BYTES = 4096  # expands to at most 128 MiB: a block of zstd is 4 bytes or more, and 128 KiB at most
_BUFFER_BYTES = 1 << 20


def is_compressed(name: str) -> bool:
    """Tells whether a file is read through a decompressor, by its name."""
    return name.endswith((".gz", ".zst"))


@contextmanager
def decompressed(root: str, name: str) -> Iterator[BinaryIO]:
    """Opens a file below the root; a compressed one is read as what it holds and cannot be sought in.

    Raises:
        StorageError: it may not or cannot be read, or is gone.
        DataError: it is compressed and damaged or cut short; also while it is read.
    """
    with opened(root, name) as file:
        if not is_compressed(name):
            yield file
            return
        zipped = name.endswith(".gz")
        try:
            with gzip.GzipFile(fileobj=file) if zipped else io.BufferedReader(_Zstd(file), _BUFFER_BYTES) as plain:
                yield cast(BinaryIO, plain)
        except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as error:
            raise damaged(f"{shown(root)}/{name}", cause_of(error)) from error


class _Zstd(io.RawIOBase):
    """The contents of all zstd frames of a file; unlike `zstandard`'s own reader it knows an unfinished frame."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._fed = b""
        self._ready = memoryview(b"")

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        while not self._ready:
            fed = self._fed or self._file.read(_FEED_BYTES)
            self._fed = b""
            if not fed:
                if self._frame:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._ready = memoryview(frame.decompress(fed))
            self._frame = frame
            if frame.eof:
                self._fed, self._frame = frame.unused_data, None
        target = memoryview(buffer)
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count
