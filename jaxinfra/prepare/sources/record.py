"""Records (rows of source data), and the interface of a source, from which they are read.

A source lists its files without reading them and splits them into shards, which workers read in parallel. The list
of shards, their order and their records depend on the files alone, never on the number of workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from jaxinfra.config import Extensible

Fields = Mapping[str, Any]
"""The fields of a record by name."""


@dataclass(frozen=True, kw_only=True)
class SourceShard:
    """A file of a source, or a range of a file, that is read by one worker."""

    name: str  # path of the file relative to the root of the source, with slashes
    start: int = 0  # first byte, row or record, depending on the source
    end: int | None = None  # exclusive; None is the end of the file
    size_bytes: int  # estimated
    stamp: str  # changes when the file is replaced; made from size, time and version, not from the contents


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record that was read."""

    key: str  # stable identifier, which decides whether the record is in the training or the validation split
    location: str  # file and line or number, for messages
    fields: Fields


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that cannot be read, with the cause."""

    location: str
    cause: str


type Records = Iterator[Record | BadRecord]


def parse_record[T](parse: Callable[[T], Fields], content: T, *, key: str, location: str) -> Record | BadRecord:
    """Parses a record; a ValueError of `parse` makes it a bad record."""
    try:
        return Record(key=key, location=location, fields=parse(content))
    except ValueError as error:
        return BadRecord(location=location, cause=str(error))


class Source(Extensible, ABC):
    """Config of where records are read from: your own is a frozen dataclass that inherits from this class.

    Both methods raise ConfigError for a missing file or package, DataError for a file that is damaged as a whole, and
    StorageError for a file that cannot be read.
    """

    def pinned(self) -> Self:
        """Returns the source with the snapshot that it has now, if it is a table with snapshots and names none."""
        return self

    @abstractmethod
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        """Lists all shards, sorted by name and start; files much larger than `shard_bytes` are split."""

    @abstractmethod
    def read(self, shard: SourceShard) -> Records:
        """Yields the records of a shard in order, without holding the whole shard in memory if the format allows it."""
