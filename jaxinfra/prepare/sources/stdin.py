"""Records from standard input: one JSON object a line.

A pipe cannot be rewound. To continue, the user sends the same stream from its beginning. The part that was read before
is skipped, and its hash must be equal to the stored one.
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
from jaxinfra.prepare.sources.record import BadRecord, Record, parse_record
from jaxinfra.prepare.sources.stream import POLL_S, Position, StreamReader, StreamSource
from jaxinfra.prepare.sources.text import MAX_RECORD_BYTES, parse_json_object
from jaxinfra.storage.errors import storage_errors

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Stdin(StreamSource):
    """JSON objects on standard input, one a line; blank lines are ignored."""

    @property
    @override
    def name(self) -> str:
        return "stdin"

    @override
    def open(self, position: Position) -> AbstractContextManager["_StdinReader"]:
        if sys.stdin is None:
            raise StorageError("stdin: is closed; pipe the records in")
        return nullcontext(_StdinReader(sys.stdin.fileno(), position))


class _StdinReader(StreamReader):
    """Reads lines of a file descriptor; offsets and line numbers count from the beginning of the stream."""

    def __init__(self, descriptor: int, position: Position):
        self._descriptor, self._expected = descriptor, position
        self._digest = xxhash.xxh3_128()
        self._offset = self._lines = 0

    @property
    @override
    def position(self) -> Position:
        return {"bytes": self._offset, "lines": self._lines, "digest": self._digest.hexdigest()}

    @override
    def poll(self) -> Iterator[Record | BadRecord | None]:
        chunks = self._chunks()
        if self._expected:
            rest = yield from self._skip_known(chunks)
            chunks = itertools.chain([rest] if rest else [], chunks)
        # The line that is being read: its parts, its size, and the digest of the stream up to its end so far.
        line_parts, line_bytes, digest = list[bytes](), 0, self._digest.copy()
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            for part in io.BytesIO(chunk) if chunk else [b""]:  # iterating a BytesIO splits it into lines
                digest.update(part)
                line_bytes += len(part)
                line_parts = [*line_parts, part] if line_bytes <= MAX_RECORD_BYTES else []  # [] marks a bad record
                at_end_of_stream = not chunk and line_bytes
                if part.endswith(b"\n") or at_end_of_stream:
                    record = self._finish_line(line_parts, line_bytes, digest)
                    if record is not None:
                        yield record
                    line_parts, line_bytes, digest = [], 0, digest.copy()

    def _finish_line(self, parts: list[bytes], num_bytes: int, digest: xxhash.xxh3_128) -> Record | BadRecord | None:
        """Parses a line, which is too long if it has no parts, and moves the position past it; None if it is blank."""
        start = self._offset
        self._offset, self._lines, self._digest = start + num_bytes, self._lines + 1, digest
        self.read_bytes += num_bytes
        location = f"stdin:{self._lines}"
        if not parts:
            return BadRecord(location=location, cause=f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        content = b"".join(parts).strip()
        if not content:
            return None
        return parse_record(parse_json_object, content, key=f"stdin@{start}", location=location)

    def _skip_known(self, chunks: Iterator[bytes | None]) -> Generator[None, None, bytes]:
        """Skips the part that was read before, checks its hash, and returns the rest of the last chunk."""
        expected: int = self._expected["bytes"]
        rest = b""
        for chunk in chunks:
            if chunk is None:
                yield None
                continue
            left = expected - self._offset  # bytes to skip
            self._digest.update(chunk[:left])
            self._offset += len(chunk[:left])
            rest = chunk[left:]
            if self._offset == expected:
                break
        self._lines = self._expected["lines"]
        if self.position != self._expected:
            raise DataError(
                f"stdin: does not begin with the {expected} bytes that were read before; send the same stream from its "
                "beginning, or use another store"
            )
        return rest

    def _chunks(self) -> Iterator[bytes | None]:
        """Yields bytes as they arrive, None if none arrived for a moment, and b"" at the end of the stream."""
        while True:
            with storage_errors("stdin", action="read", fix="pipe the records in"):
                ready, _, _ = select.select([self._descriptor], [], [], POLL_S)
                chunk = os.read(self._descriptor, _CHUNK_BYTES) if ready else None
            yield chunk
            if chunk == b"":
                return
