"""Text files, plain or compressed, as records: whole files, lines of text, or JSON lines.

Files of lines are split into byte ranges. A shard has the lines that begin in its range, so every line is in one
shard. Offsets count decompressed bytes; compressed files are not split. A damaged or truncated file is an error, not a
shorter file.
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

from jaxinfra.config.limits import NonNegativeInt
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.files import FileSource, damaged_file, split_files
from jaxinfra.prepare.sources.record import BadRecord, Fields, Record, Records, SourceShard, parse_record
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import FileInfo, display_url, list_files, open_file

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_RECORD_BYTES = 256 << 20
"""Longest line or document; parsing takes several times its size of memory."""
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_COMPRESSED = (".gz", ".zst")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a pair
_JSON_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class TextFiles(FileSource):
    """Text files as records `{"text": str}`, with line ends unchanged; the key is the file name.

    Files that end in .gz and .zst are decompressed.

    Attributes:
        root: folder or URL; `stdlib` is the standard library of the running Python.
        min_bytes: smaller files are left out.
    """

    pattern: str = "**/*.txt"
    min_bytes: NonNegativeInt = 1

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        files = list_files(self.root, self.pattern)
        kept = [file for file in files if file.name.endswith(_COMPRESSED) or file.size_bytes >= self.min_bytes]
        if not kept:
            which = f"all {len(files)} files that match in {display_url(self.root)}"
            raise ConfigError(f"min_bytes={self.min_bytes}: {which} are shorter; use min_bytes=1")
        return split_files(kept, self._length, shard_bytes)

    @override
    def read(self, shard: SourceShard) -> Records:
        with _open_decompressed(self.root, shard.name) as file:
            content = file.read(MAX_RECORD_BYTES + 1)
        if len(content) > MAX_RECORD_BYTES:
            yield BadRecord(location=shard.name, cause=f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        elif len(content) >= self.min_bytes:
            yield parse_record(parse_text, content, key=shard.name, location=shard.name)


@dataclass(frozen=True, kw_only=True)
class _LineSource(FileSource):
    """Lines of text files; .gz and .zst are decompressed."""

    @override
    def read(self, shard: SourceShard) -> Records:
        # Lines before the shard are counted only if a message needs a line number, because bad lines are rare.
        lines_before = None if shard.start else 0
        for index, (offset, line) in enumerate(_read_lines(self.root, shard)):
            try:
                if line is None:
                    raise ValueError(f"longer than {MAX_RECORD_BYTES >> 20} MiB")
                fields = self._parse(line)
            except ValueError as error:
                if lines_before is None:
                    lines_before = _count_newlines(self.root, shard.name, offset) - index
                yield BadRecord(location=f"{shard.name}:{lines_before + index + 1}", cause=str(error))
            else:
                if fields is not None:
                    location = f"{shard.name} at byte {offset}" if shard.start else f"{shard.name}:{index + 1}"
                    yield Record(key=f"{shard.name}@{offset}", location=location, fields=fields)

    @abstractmethod
    def _parse(self, line: bytes) -> Fields | None:
        """Parses a line, None for an empty one; ValueError says what is wrong with it."""

    @override
    def _length(self, file: FileInfo) -> int:
        return 1 if file.name.endswith(_COMPRESSED) else file.size_bytes


@dataclass(frozen=True, kw_only=True)
class TextLines(_LineSource):
    """Lines of text files, as records `{"text": str}` without the line end; empty lines are ignored."""

    pattern: str = "**/*.txt*"

    @override
    def _parse(self, line: bytes) -> Fields | None:
        return parse_text(line) if line else None


@dataclass(frozen=True, kw_only=True)
class Jsonl(_LineSource):
    """JSON objects, one a line; blank lines are ignored. `NaN` and `Infinity` are read as numbers, as Python does."""

    pattern: str = "**/*.jsonl*"

    @override
    def _parse(self, line: bytes) -> Fields | None:
        return parse_json_object(line) if line.strip() else None


def parse_text(content: bytes) -> dict[str, str]:
    """Decodes UTF-8 to `{"text": str}`; ValueError if it is not UTF-8."""
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None


def parse_json_object(content: bytes) -> Fields:
    """Parses a JSON object in UTF-8; ValueError if it is not one, or has strings that UTF-8 cannot encode."""
    text = parse_text(content)["text"]
    try:
        value = json.loads(text)
        if _SURROGATE.search(text):  # encoding every record would be slow
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise ValueError("has an unpaired surrogate (\\ud800 to \\udfff)") from None
    except ValueError:  # the only other one: Python's limit for integers
        raise ValueError("has a number of more than 4300 digits") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {_JSON_NAMES.get(type(value), 'a number')}, expected an object")
    return value


def _read_lines(root: str, shard: SourceShard) -> Iterator[tuple[int, bytes | None]]:
    """Yields each line that begins in a shard, with the offset of its first byte.

    Line ends and a byte order mark are removed; None stands for a line that is too long.
    """
    with _open_decompressed(root, shard.name) as file:
        # Starts one byte early, to see whether a line begins at the start of the shard.
        if offset := max(0, shard.start - 1):
            file.seek(offset)
        at_line_start = offset == shard.start
        while shard.end is None or offset < shard.end:
            line = file.readline(MAX_RECORD_BYTES + 1 if at_line_start else _CHUNK_BYTES)
            if not line:
                return
            if not at_line_start:  # the rest of a line of the shard before, or of one that is too long
                at_line_start = line.endswith(b"\n")
            elif len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                yield offset, None
                at_line_start = False
            else:
                text = line.removesuffix(b"\n").removesuffix(b"\r")
                yield offset, text if offset else text.removeprefix(_BOM)
            offset += len(line)


def _count_newlines(root: str, name: str, end: int) -> int:
    """Counts the newlines in the first `end` bytes of a file."""
    count = 0
    with open_file(root, name) as file:
        while chunk := file.read(min(end, _CHUNK_BYTES)):
            count += chunk.count(b"\n")
            end -= len(chunk)
    return count


@contextmanager
def _open_decompressed(root: str, name: str) -> Iterator[BinaryIO]:
    """Opens a file; a compressed one cannot seek. DataError, also while reading, if it is damaged or truncated."""
    with open_file(root, name) as file:
        if not name.endswith(_COMPRESSED):
            yield file
            return
        try:
            plain = gzip.GzipFile(fileobj=file) if name.endswith(".gz") else zstd.ZstdFile(file)
            with io.BufferedReader(plain, _CHUNK_BYTES) as reader:
                yield reader
        except (gzip.BadGzipFile, zlib.error, zstd.ZstdError, EOFError) as error:
            raise damaged_file(f"{display_url(root)}/{name}", cause_of(error)) from error
