"""What the sources that pyarrow reads have in common: rows of batches as records, and errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxinfra.errors import DataError
from jaxinfra.packages import needed
from jaxinfra.prepare.sources.record import Bad, Found
from jaxinfra.storage.errors import cause_of


@contextmanager
def damage_named(where: str, extra: str) -> Iterator[Any]:
    """Gives pyarrow, and says which file is damaged when it cannot be read as what it should be.

    Args:
        where: the file.
        extra: of jaxinfra, that installs pyarrow.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: of what pyarrow raises; what the file system raises passes.
    """
    pa = needed("pyarrow", by=where, install=f"jaxinfra[{extra}]")
    try:
        yield pa
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{where}: is damaged ({cause_of(error)}); restore the file or make it again") from error


def records_of(batch: Any, name: str, first: int) -> Iterator[Found | Bad]:
    """Yields the rows of a record batch.

    Args:
        batch: of pyarrow.
        name: of the file.
        first: number of the first row in the file.
    """
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, times that Python has not: find the rows
        for index in range(batch.num_rows):
            where = f"{name} row {first + index}"
            try:
                (row,) = batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield Bad(where=where, cause=f"has no value that Python can hold: {str(error).partition('\n')[0]}")
            else:
                yield Found(key=f"{name}#{first + index}", where=where, record=row)
        return
    for index, row in enumerate(rows, first):
        yield Found(key=f"{name}#{index}", where=f"{name} row {index}", record=row)
