"""Every text file is a record: its whole text, line ends as they are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.compressed import decompressed, is_compressed
from jaxinfra.prepare.sources.files import problems_of, whole
from jaxinfra.prepare.sources.lines import MAX_RECORD_BYTES, text_of
from jaxinfra.prepare.sources.record import Bad, Found, Piece
from jaxinfra.storage.files import STDLIB, list_files, shown


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """Text files, as records `{"text": str}`; the key of each is its name relative to the root.

    Attributes:
        root: folder or URL that holds the files; the word `stdlib` is the running Python's standard library.
        pattern: which files below the root, as in `pathlib.Path.glob`; .gz and .zst are decompressed.
        min_bytes: files with less text than this are left out.
    """

    root: str = STDLIB
    pattern: str = "**/*.py"
    min_bytes: int = 1

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        yield from problems_of(self.root, self.pattern, "**/*.txt")
        if self.min_bytes < 0:
            yield Problem(fields=("min_bytes",), message="must not be negative", fix="use min_bytes=0")

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """One piece a file: documents are not cut. Raises as `Source.pieces` does."""
        files = list_files(self.root, self.pattern)
        pieces = [whole(file) for file in files if is_compressed(file.name) or file.size_bytes >= self.min_bytes]
        if not pieces:
            raise ConfigError(
                f"min_bytes={self.min_bytes}: all {len(files)} files that match in {shown(self.root)} are shorter; "
                "use less"
            )
        return pieces

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the file, unless it turns out to be too short. Raises as `Source.read` does."""
        with decompressed(self.root, piece.name) as file:
            content = file.read(MAX_RECORD_BYTES + 1)
        if len(content) > MAX_RECORD_BYTES:
            yield Bad(where=piece.name, cause=f"longer than {MAX_RECORD_BYTES >> 20} MiB")
        elif len(content) >= self.min_bytes:
            try:
                record = {"text": text_of(content)}
            except ValueError as error:
                yield Bad(where=piece.name, cause=str(error))
            else:
                yield Found(key=piece.name, where=piece.name, record=record)
