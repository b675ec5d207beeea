"""Records, and the interface of a source that they are read from.

A source lists its files without reading them and splits them into shards, which workers read in parallel. The list
of shards, their order and their records depend on the files alone, never on the number of workers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Fields = Mapping[str, Any]
"""The fields of a record by name."""


@dataclass(frozen=True, kw_only=True)
class SourceShard:
    """A file of a source, or a range of one, that one worker reads.

    Attributes:
        name: file name relative to the root of the source, with slashes.
        start: first byte, row or record; the source chooses the unit.
        end: end of the range, exclusive; None is the end of the file.
        size_bytes: estimate.
        stamp: changes when the file is replaced; made from size, time and version, not from the contents.
    """

    name: str
    start: int = 0
    end: int | None = None
    size_bytes: int
    stamp: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record that was read.

    Attributes:
        key: stable identifier, which decides whether the record is in the training or the validation split.
        location: file and line or number, for messages.
    """

    key: str
    location: str
    fields: Fields


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that cannot be read, and why."""

    location: str
    cause: str


def parse_record[T](parse: Callable[[T], Fields], content: T, *, key: str, location: str) -> Record | BadRecord:
    """Parses a record; a ValueError of `parse` becomes the cause of a bad record."""
    try:
        return Record(key=key, location=location, fields=parse(content))
    except ValueError as error:
        return BadRecord(location=location, cause=str(error))


class Source(ABC):
    """Config of a place that records are read from.

    Both methods raise ConfigError for a missing file or package, DataError for a file that is damaged as a whole, and
    StorageError for one that cannot be read.
    """

    @abstractmethod
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        """Lists all shards, sorted by name and start; files much larger than `shard_bytes` are split."""

    @abstractmethod
    def read(self, shard: SourceShard) -> Iterator[Record | BadRecord]:
        """Yields the records of a shard in order, and holds only as many in memory as the format needs."""
