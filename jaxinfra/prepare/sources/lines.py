"""Reads files of lines, plain or compressed, in ranges of bytes. It does not know what a line means.

A range has the lines that begin in it, so ranges that follow one another have every line once. Offsets are those of
the text, as it is when it is not compressed; compressed files are read from the beginning and are not cut.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, override

from jaxinfra.prepare.sources.compressed import decompressed, is_compressed
from jaxinfra.prepare.sources.files import Files
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record
from jaxinfra.storage.files import File, opened

MAX_RECORD_BYTES = 256 << 20
"""Of one line or document: a longer one is no record, and reading it would take several times its size of memory."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class LineFiles(Files):
    """Lines of text files; .gz and .zst are decompressed."""

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        before = None if piece.start else 0  # lines; they are counted when a number is asked for: lines are rarely bad
        for index, (offset, line) in enumerate(_lines(self.root, piece)):
            try:
                if line is None:
                    raise ValueError(f"longer than {MAX_RECORD_BYTES >> 20} MiB")
                record = self._record(line)
            except ValueError as error:
                if before is None:
                    before = _ends_before(self.root, piece.name, offset) - index
                yield Bad(where=f"{piece.name}:{before + index + 1}", cause=str(error))
            else:
                if record is not None:
                    where = f"{piece.name} at byte {offset}" if piece.start else f"{piece.name}:{index + 1}"
                    yield Found(key=f"{piece.name}@{offset}", where=where, record=record)

    @abstractmethod
    def _record(self, line: bytes) -> Record | None:
        """Returns what a line spells, None for nothing; raises ValueError, which says what is wrong with it."""

    @override
    def _count(self, file: File) -> int:
        return 1 if is_compressed(file.name) else file.size_bytes


def text_of(content: bytes) -> str:
    """Decodes UTF-8; a ValueError says where it is none."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def text_record(content: bytes) -> Record:
    """Makes the record `{"text": str}` of UTF-8. Raises as `text_of`."""
    return {"text": text_of(content)}


def _lines(root: str, piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines that begin in a piece, empty ones too, each with the offset of its first byte.

    They are without their end and without a byte order mark; None stands for one that is too long.
    """
    with decompressed(root, piece.name) as file:
        offset = 0
        if piece.start:
            file.seek(piece.start - 1)
            offset = piece.start - 1 + _skip_line(file, piece.end and piece.end - piece.start + 1)
        while piece.end is None or offset < piece.end:
            line = file.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            length = len(line)
            if length > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                length += _skip_line(file)
                yield offset, None
            else:
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                yield offset, line if offset else line.removeprefix(_BOM)
            offset += length


def _ends_before(root: str, name: str, offset: int) -> int:
    """Counts the ends of lines in the first bytes of a file."""
    found = 0
    with opened(root, name) as file:
        while chunk := file.read(min(offset, _CHUNK_BYTES)):
            found += chunk.count(b"\n")
            offset -= len(chunk)
    return found


def _skip_line(file: BinaryIO, most_bytes: int | None = None) -> int:
    """Goes on to the next line, or no further than about `most_bytes`; returns the bytes passed over."""
    skipped = 0
    while (most_bytes is None or skipped < most_bytes) and (part := file.readline(_CHUNK_BYTES)):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped
