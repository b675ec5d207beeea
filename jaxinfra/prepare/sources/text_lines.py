"""Every line of text files is a record."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jaxinfra.config import Problem
from jaxinfra.prepare.sources.files import problems_of
from jaxinfra.prepare.sources.lines import line_pieces, read_records, text_of
from jaxinfra.prepare.sources.record import Bad, Found, Piece


@dataclass(frozen=True, kw_only=True)
class TextLines:
    """Lines of text files, as records `{"text": str}` without the end of the line; empty lines are none.

    Attributes:
        root: folder or URL that holds the files.
        pattern: which files below the root, as in `pathlib.Path.glob`; .gz and .zst are decompressed.
    """

    root: str = ""
    pattern: str = "**/*.txt*"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        return problems_of(self.root, self.pattern, "**/*.txt")

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Ranges of bytes of the files. Raises as `Source.pieces` does."""
        return line_pieces(self.root, self.pattern, split_bytes)

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the lines that begin in the piece. Raises as `Source.read` does."""
        return read_records(self.root, piece, lambda line: {"text": text_of(line)} if line else None)
