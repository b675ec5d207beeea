"""Records from standard input: JSON objects, one a line, as they come through a pipe.

The stream cannot be asked for what it has already given, so whoever goes on must send it from the beginning: what was
read before is passed over, and its hash must be that of what was read then.
"""

import io
import itertools
import os
import select
import sys
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import override

import xxhash

from jaxinfra.errors import DataError, StorageError
from jaxinfra.prepare.sources.record import Bad, Found, read_as
from jaxinfra.prepare.sources.stream import TICK_S, Position, Reader, Stream
from jaxinfra.prepare.sources.text import MAX_RECORD_BYTES, json_object
from jaxinfra.storage.errors import storage_errors

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Stdin(Stream):
    """JSON objects on standard input, one a line; blank lines are none."""

    @property
    @override
    def name(self) -> str:
        return "stdin"

    @override
    def open(self, position: Position) -> AbstractContextManager["_Reader"]:
        if sys.stdin is None:
            raise StorageError("stdin: is closed; pipe the records in")
        return nullcontext(_Reader(sys.stdin.fileno(), position))


class _Reader(Reader):
    """Lines of a file descriptor. Offsets and numbers are those of the stream, not of this process's share of it."""

    def __init__(self, descriptor: int, position: Position):
        self._descriptor, self._expected = descriptor, position
        self._digest = xxhash.xxh3_128()
        self._offset = self._lines = 0

    @property
    @override
    def position(self) -> Position:
        return {"bytes": self._offset, "lines": self._lines, "digest": self._digest.hexdigest()}

    @override
    def arrivals(self) -> Iterator[Found | Bad | None]:
        chunks = self._chunks()
        if self._expected:
            left = yield from self._skip(chunks)
            chunks = itertools.chain([left] if left else [], chunks)
        digest, size_bytes, parts = self._digest.copy(), 0, list[bytes]()
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            for part in io.BytesIO(chunk) if chunk else [b""]:
                digest.update(part)
                size_bytes += len(part)
                parts = [*parts, part] if size_bytes <= MAX_RECORD_BYTES else []
                if part.endswith(b"\n") or (not chunk and size_bytes):
                    found = self._line(parts, size_bytes, digest)
                    if found is not None:
                        yield found
                    digest, size_bytes, parts = digest.copy(), 0, []

    def _line(self, parts: list[bytes], size_bytes: int, digest: xxhash.xxh3_128) -> Found | Bad | None:
        """Reads what a line spells; the stream stands after it from now on."""
        start = self._offset
        self._offset, self._lines, self._digest = start + size_bytes, self._lines + 1, digest
        self.read_bytes += size_bytes
        where = f"stdin:{self._lines}"
        if not parts:
            return Bad(where=where, cause=f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        content = b"".join(parts).strip()
        return read_as(json_object, content, key=f"stdin@{start}", where=where) if content else None

    def _skip(self, chunks: Iterator[bytes | None]) -> Generator[None, None, bytes]:
        """Passes over what was read before, looks whether it is the same, and returns the rest of its last chunk."""
        expected: int = self._expected["bytes"]
        left = b""
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            own, left = chunk[: expected - self._offset], chunk[expected - self._offset :]
            self._digest.update(own)
            self._offset += len(own)
            if self._offset == expected:
                break
        self._lines = self._expected["lines"]
        if self.position != self._expected:
            raise DataError(
                f"stdin: does not begin with the {expected} bytes that were read of it before; send the same stream "
                "from its beginning, or make another store"
            )
        return left

    def _chunks(self) -> Iterator[bytes | None]:
        """Yields what comes, None when nothing did for a moment, and at the end of the stream b""."""
        while True:
            with storage_errors("stdin", action="read", fix="pipe the records in"):
                ready, _, _ = select.select([self._descriptor], [], [], TICK_S)
                chunk = os.read(self._descriptor, _CHUNK_BYTES) if ready else None
            yield chunk
            if chunk == b"":
                return
