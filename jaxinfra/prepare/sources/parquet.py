"""Every row of Parquet files is a record."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, override

from jaxinfra.config import Problem
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.arrow import arrow_file, records_of
from jaxinfra.prepare.sources.files import Files
from jaxinfra.prepare.sources.record import Bad, Found, Piece
from jaxinfra.storage.files import File, shown

_BATCH_ROWS = 128
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Parquet(Files):
    """Rows of Parquet files, cut between row groups; checksums of pages are checked where a file has them.

    Attributes:
        columns: the columns to read; none are all.
    """

    pattern: str = "**/*.parquet"
    columns: tuple[str, ...] = ()

    @override
    def problems(self) -> Iterable[Problem]:
        yield from super().problems()
        if "" in self.columns or len(set(self.columns)) < len(self.columns):
            fix = "use columns=() to read all columns"
            yield Problem(fields=("columns",), message="must be names, each once", fix=fix)

    @override
    def _count(self, file: File) -> int:
        with self._opened(file.name) as table:
            return table.num_row_groups

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        with self._opened(piece.name) as table:
            names = table.schema_arrow.names
            if missing := [column for column in self.columns if column not in names]:
                raise ConfigError(
                    f"columns={self.columns}: {shown(self.root)}/{piece.name} has no {', '.join(missing)}; "
                    f"it has {', '.join(names) or 'none'}"
                )
            end = table.num_row_groups if piece.end is None else piece.end
            row = sum(table.metadata.row_group(group).num_rows for group in range(piece.start))
            columns = list(self.columns) or None
            groups = list(range(piece.start, end))
            for batch in table.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns, use_threads=False):
                yield from records_of(batch, piece.name, row)
                row += batch.num_rows

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        with arrow_file(self.root, name, "parquet") as (_, file):
            from pyarrow.parquet import ParquetFile

            # Read ahead by a buffer, not by whole column chunks: a row group may be larger than memory.
            options = {"pre_buffer": False, "buffer_size": _BUFFER_BYTES, "page_checksum_verification": True}
            with ParquetFile(file, **options) as table:
                yield table
