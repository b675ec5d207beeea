"""Every row of Parquet files is a record."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.arrow import damage_named, records_of
from jaxinfra.prepare.sources.files import cut, parts_of, problems_of, whole
from jaxinfra.prepare.sources.record import Bad, Found, Piece
from jaxinfra.storage.files import list_files, opened, shown

_BATCH_ROWS = 128
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """Rows of Parquet files, cut between row groups; checksums of pages are checked where a file has them.

    Attributes:
        root: folder or URL that holds the files.
        pattern: which files below the root, as in `pathlib.Path.glob`.
        columns: the columns to read; none are all.
    """

    root: str = ""
    pattern: str = "**/*.parquet"
    columns: tuple[str, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        yield from problems_of(self.root, self.pattern, "**/*.parquet")
        if "" in self.columns or len(set(self.columns)) < len(self.columns):
            yield Problem(
                fields=("columns",), message="must be names, each once", fix="use columns=() to read all columns"
            )

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Ranges of row groups; only files large enough to be cut are opened. Raises as `Source.pieces` does."""
        pieces: list[Piece] = []
        for file in list_files(self.root, self.pattern):
            if parts_of(file.size_bytes, split_bytes) == 1:
                pieces.append(whole(file))
            else:
                with self._opened(file.name) as table:
                    pieces += cut(file, table.num_row_groups, split_bytes)
        return pieces

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the rows of the row groups `piece.start` to `piece.end`. Raises as `Source.read` does.

        Raises:
            ConfigError: a file has not the columns.
        """
        with self._opened(piece.name) as table:
            self._require_columns(piece.name, table.schema_arrow.names)
            end = table.num_row_groups if piece.end is None else piece.end
            row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
            columns = list(self.columns) or None
            groups = list(range(piece.start, end))
            for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
                yield from records_of(batch, piece.name, row)
                row += batch.num_rows

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        where = f"{shown(self.root)}/{name}"
        with opened(self.root, name) as file, damage_named(where, "parquet"):
            from pyarrow.parquet import ParquetFile

            # Read ahead by a buffer, not by whole column chunks: a row group may be larger than memory.
            with ParquetFile(
                file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
            ) as table:
                yield table

    def _require_columns(self, name: str, names: Sequence[str]) -> None:
        missing = [column for column in self.columns if column not in names]
        if missing:
            raise ConfigError(
                f"columns={self.columns}: {shown(self.root)}/{name} has no {', '.join(missing)}; "
                f"it has {', '.join(names) or 'none'}"
            )
