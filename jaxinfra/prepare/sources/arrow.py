"""What the sources that pyarrow reads have in common: rows of batches as records, and errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from jaxinfra.packages import needed
from jaxinfra.prepare.sources.files import damaged
from jaxinfra.prepare.sources.record import Bad, Found
from jaxinfra.storage.errors import cause_of
from jaxinfra.storage.files import opened, shown


@contextmanager
def arrow_file(root: str, name: str, extra: str) -> Iterator[tuple[Any, BinaryIO]]:
    """Gives pyarrow, which is installed by an extra of jaxinfra, and an open file for it to read.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: the file cannot be read as what it should be.
        StorageError: it may not or cannot be read, or is gone.
    """
    where = f"{shown(root)}/{name}"
    pa = needed("pyarrow", by=where, install=f"jaxinfra[{extra}]")
    with opened(root, name) as file:
        try:
            yield pa, file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise damaged(where, cause_of(error)) from error


def records_of(batch: Any, name: str, first: int) -> Iterator[Found | Bad]:
    """Yields the rows of a record batch of pyarrow, of which the first one has the number `first` in the file."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, times that Python has not: find the rows
        if batch.num_rows == 1:
            cause = f"has no value that Python can hold: {str(error).partition('\n')[0]}"
            yield Bad(where=f"{name} row {first}", cause=cause)
        else:
            for index in range(batch.num_rows):
                yield from records_of(batch.slice(index, 1), name, first + index)
        return
    for index, row in enumerate(rows, first):
        yield Found(key=f"{name}#{index}", where=f"{name} row {index}", record=row)
