"""Text files, plain or compressed: every file is a record, or every line is, as text or as a JSON object.

Files of lines are cut into ranges of bytes. A range has the lines that begin in it, so ranges that follow one another
have every line once. Offsets are those of the text, as it is when it is not compressed; compressed files are read from
the beginning and are not cut. What is cut short or damaged is an error, never an end.
"""

import gzip
import io
import json
import re
import sys
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, override

from jaxinfra.config.limits import Natural, NonEmpty
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.files import Files, cut, damaged
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record, read_as
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import STDLIB, FileInfo, display_url, list_files, open_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_RECORD_BYTES = 256 << 20
"""Of one line or document: a longer one is no record, and reading it would take several times its size of memory."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_COMPRESSED = (".gz", ".zst")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a character beyond U+FFFF
_JSON_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class TextFiles(Files):
    """Text files, as records `{"text": str}`, line ends as they are; the key of each is its name below the root.

    Attributes:
        root: folder or URL that holds the files; the word `stdlib` is the running Python's standard library.
        pattern: which files below the root, as in `pathlib.Path.glob`; .gz and .zst are decompressed.
        min_bytes: files with less text than this are left out.
    """

    root: NonEmpty = STDLIB
    pattern: str = "**/*.py"
    min_bytes: Natural = 1

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        files = list_files(self.root, self.pattern)
        found = [file for file in files if file.name.endswith(_COMPRESSED) or file.size_bytes >= self.min_bytes]
        if not found:
            here = f"all {len(files)} files that match in {display_url(self.root)}"
            raise ConfigError(f"min_bytes={self.min_bytes}: {here} are shorter; use less")
        return cut(found, self._count, split_bytes)

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        with _decompressed(self.root, piece.name) as file:
            content = file.read(MAX_RECORD_BYTES + 1)
        if len(content) > MAX_RECORD_BYTES:
            yield Bad(where=piece.name, cause=f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        elif len(content) >= self.min_bytes:
            yield read_as(text_record, content, key=piece.name, where=piece.name)


@dataclass(frozen=True, kw_only=True)
class _Lines(Files):
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
    def _count(self, file: FileInfo) -> int:
        return 1 if file.name.endswith(_COMPRESSED) else file.size_bytes


@dataclass(frozen=True, kw_only=True)
class TextLines(_Lines):
    """Lines of text files, as records `{"text": str}` without the end of the line; empty lines are none."""

    pattern: str = "**/*.txt*"

    @override
    def _record(self, line: bytes) -> Record | None:
        return text_record(line) if line else None


@dataclass(frozen=True, kw_only=True)
class Jsonl(_Lines):
    """JSON objects, one a line; blank lines are none. `NaN` and `Infinity` of Python are read as numbers."""

    pattern: str = "**/*.jsonl*"

    @override
    def _record(self, line: bytes) -> Record | None:
        return json_object(line) if line.strip() else None


def text_record(content: bytes) -> dict[str, str]:
    """Makes the record `{"text": str}` of UTF-8; a ValueError says where it is none."""
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def json_object(content: bytes) -> Record:
    """Reads a JSON object in UTF-8; a ValueError says that it is none, or one that no text can be made of."""
    text = text_record(content)["text"]
    try:
        value = json.loads(text)
        if _HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise ValueError("spells half a character (an unpaired \\ud800 to \\udfff)") from None
    except ValueError:
        raise ValueError("has a number of more than 4300 digits") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {_JSON_NAMES.get(type(value), 'a number')}, expected an object")
    return value


def _lines(root: str, piece: Piece) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines that begin in a piece, empty ones too, each with the offset of its first byte.

    They are without their end and without a byte order mark; None stands for one that is too long.
    """
    with _decompressed(root, piece.name) as file:
        if offset := max(0, piece.start - 1):
            file.seek(offset)
        begins = offset == piece.start  # whether a line begins here, or goes on that is not of this piece or too long
        while piece.end is None or offset < piece.end:
            line = file.readline(MAX_RECORD_BYTES + 1 if begins else _CHUNK_BYTES)
            if not line:
                return
            if not begins:
                begins = line.endswith(b"\n")
            elif len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                yield offset, None
                begins = False
            else:
                text = line.removesuffix(b"\n").removesuffix(b"\r")
                yield offset, text if offset else text.removeprefix(_BOM)
            offset += len(line)


def _ends_before(root: str, name: str, offset: int) -> int:
    """Counts the ends of lines in the first bytes of a file."""
    found = 0
    with open_file(root, name) as file:
        while chunk := file.read(min(offset, _CHUNK_BYTES)):
            found += chunk.count(b"\n")
            offset -= len(chunk)
    return found


@contextmanager
def _decompressed(root: str, name: str) -> Iterator[BinaryIO]:
    """Opens a file below the root; a compressed one is read as what it holds and cannot be sought in.

    One that is damaged or cut short is a DataError, also while it is read.
    """
    with open_file(root, name) as file:
        if not name.endswith(_COMPRESSED):
            yield file
            return
        try:
            plain = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else zstd.ZstdFile(file)
            with io.BufferedReader(plain, _CHUNK_BYTES) as reader:
                yield reader
        except (gzip.BadGzipFile, zlib.error, zstd.ZstdError, EOFError) as error:
            raise damaged(f"{display_url(root)}/{name}", cause_of(error)) from error
