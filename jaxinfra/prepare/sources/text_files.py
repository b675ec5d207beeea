"""Every text file is a record: its whole text, line ends as they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import override

from jaxinfra.config.limits import Natural
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.compressed import decompressed, is_compressed
from jaxinfra.prepare.sources.files import Files, cut_files
from jaxinfra.prepare.sources.lines import MAX_RECORD_BYTES, text_record
from jaxinfra.prepare.sources.record import Bad, Found, Piece, read_as
from jaxinfra.storage.files import STDLIB, list_files, shown


@dataclass(frozen=True, kw_only=True)
class TextFiles(Files):
    """Text files, as records `{"text": str}`; the key of each is its name relative to the root.

    Attributes:
        root: folder or URL that holds the files; the word `stdlib` is the running Python's standard library.
        pattern: which files below the root, as in `pathlib.Path.glob`; .gz and .zst are decompressed.
        min_bytes: files with less text than this are left out.
    """

    root: str = STDLIB
    pattern: str = "**/*.py"
    min_bytes: Natural = 1

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        files = list_files(self.root, self.pattern)
        found = [file for file in files if is_compressed(file.name) or file.size_bytes >= self.min_bytes]
        if not found:
            here = f"all {len(files)} files that match in {shown(self.root)}"
            raise ConfigError(f"min_bytes={self.min_bytes}: {here} are shorter; use less")
        return cut_files(found, self._count, split_bytes)

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        with decompressed(self.root, piece.name) as file:
            content = file.read(MAX_RECORD_BYTES + 1)
        if len(content) > MAX_RECORD_BYTES:
            yield Bad(where=piece.name, cause=f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        elif len(content) >= self.min_bytes:
            yield read_as(text_record, content, key=piece.name, where=piece.name)
