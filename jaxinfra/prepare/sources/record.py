"""What every source of records offers: it is cut into pieces, and each piece is read as a stream.

A source lists its files without reading them, and cuts large ones, so that pieces can be read in parallel. The
list of pieces, their order and the records of each are a function of the files alone: never of who reads them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
"""The fields of a record by their names."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a source that is read by one worker: a file, or a range of one.

    Attributes:
        name: of the file, relative to the root of the source, with slashes.
        start: where in the file it begins: a byte, a row or a record, as the source counts.
        end: where it ends; None is the end of the file.
        size_bytes: of the piece, about.
        stamp: changes when the file is replaced: of its size, time and version, not of its contents.
    """

    name: str
    start: int = 0
    end: int | None = None
    size_bytes: int
    stamp: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A record that was read.

    Attributes:
        key: the same for the record wherever its source is read: it decides between training and validation.
        where: for messages: the file, and the line or number in it.
    """

    key: str
    where: str
    record: Record


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A record that cannot be read, and why; `where` as in `Found`."""

    where: str
    cause: str


def read_as[T](parse: Callable[[T], Record], content: T, *, key: str, where: str) -> Found | Bad:
    """Makes a record of its content; a ValueError of `parse` says what is wrong with it."""
    try:
        return Found(key=key, where=where, record=parse(content))
    except ValueError as error:
        return Bad(where=where, cause=str(error))


class Source(ABC):
    """Records, as a config describes where they are.

    Either method raises ConfigError for what is not there or not installed, DataError for a file that is damaged as a
    whole, and StorageError for one that may not or cannot be read.
    """

    @abstractmethod
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Lists all that there is to read, sorted by name and start; files much larger than `split_bytes` are cut."""

    @abstractmethod
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the records of a piece in their order; holds no more of them in memory than the format needs."""
