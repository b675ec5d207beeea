"""Reads files of lines, plain or compressed, in ranges of bytes. It does not know what a line means.

A range has the lines that begin in it, so ranges that follow one another have every line once. Offsets are those of
the text, as it is when it is not compressed; compressed files are read from the beginning and are not cut.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from jaxinfra.prepare.sources.compressed import decompressed, is_compressed
from jaxinfra.prepare.sources.files import cut, whole
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record
from jaxinfra.storage.files import list_files, opened

MAX_RECORD_BYTES = 256 << 20
"""Of one line or document: a longer one is no record, and reading it would take several times its size of memory."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a file.

    Attributes:
        offset: of its first byte in the text.
        index: its number among the lines of the piece, from 0.
        content: without the end of the line and without a byte order mark; None when it is too long.
    """

    offset: int
    index: int
    content: bytes | None


def line_pieces(root: str, pattern: str, split_bytes: int) -> list[Piece]:
    """The files that match, those that are not compressed cut into ranges of bytes; raises as `list_files` does."""
    return [
        piece
        for file in list_files(root, pattern)
        for piece in ([whole(file)] if is_compressed(file.name) else cut(file, file.size_bytes, split_bytes))
    ]


def read_lines(root: str, piece: Piece) -> Iterator[Line]:
    """Yields the lines that begin in a piece, empty ones too.

    Raises:
        StorageError: the file may not or cannot be read, or is gone.
        DataError: it is compressed and damaged.
    """
    with decompressed(root, piece.name) as file:
        offset = 0
        if piece.start:
            file.seek(piece.start - 1)
            offset = piece.start - 1 + _skip_line(file, piece.end and piece.end - piece.start + 1)
        index = 0
        while piece.end is None or offset < piece.end:
            line = file.readline(MAX_RECORD_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                length = len(line) + _skip_line(file)
                content = None
            else:
                length = len(line)
                content = line.removesuffix(b"\n").removesuffix(b"\r")
                content = content.removeprefix(_BOM) if offset == 0 else content
            yield Line(offset=offset, index=index, content=content)
            offset += length
            index += 1


def read_records(root: str, piece: Piece, parse: Callable[[bytes], Record | None]) -> Iterator[Found | Bad]:
    """Yields what the lines that begin in a piece spell.

    Args:
        root: of the source.
        piece: of a file of lines.
        parse: what a line spells, None if nothing; raises ValueError, which says what is wrong with it.

    Raises:
        StorageError: the file may not or cannot be read, or is gone.
        DataError: it is compressed and damaged.
    """
    numbers = _Numbers(root, piece)
    for line in read_lines(root, piece):
        try:
            if line.content is None:
                raise ValueError(f"longer than {MAX_RECORD_BYTES >> 20} MiB")
            record = parse(line.content)
        except ValueError as error:
            yield Bad(where=f"{piece.name}:{numbers.of(line)}", cause=str(error))
        else:
            if record is not None:
                # The number would have to be counted where a piece does not begin a file.
                where = f"{piece.name} at byte {line.offset}" if piece.start else f"{piece.name}:{line.index + 1}"
                yield Found(key=f"{piece.name}@{line.offset}", where=where, record=record)


def text_of(content: bytes) -> str:
    """The text that UTF-8 spells.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


class _Numbers:
    """The numbers of the lines of a piece in its file. They are counted when one is asked for: lines are rarely bad."""

    def __init__(self, root: str, piece: Piece):
        """Of the lines that `read_lines` yields; reads nothing yet."""
        self._root = root
        self._piece = piece
        self._before: int | None = None if piece.start else 0

    def of(self, line: Line) -> int:
        """The number of a line, from 1.

        Raises:
            StorageError: the file may not or cannot be read, or is gone.
        """
        if self._before is None:
            self._before = self._ends_before(line.offset) - line.index
        return self._before + line.index + 1

    def _ends_before(self, offset: int) -> int:
        found = 0
        with opened(self._root, self._piece.name) as file:
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
