"""What every stream of records offers: blocks of them as they come, each with where the stream stands after it.

A stream has no pieces and may have no end. Invariant: whoever keeps a block together with its position, and opens the
stream at the last position kept, gets every record once, however often it is killed in between.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, override

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Source

Position = Mapping[str, Any]
"""Where a stream stands, in JSON; {} is its beginning."""
TICK_S = 0.5
"""A reader that nothing comes to says so this often."""
WAIT_S = 5.0
"""A record waits at most so long for others to share a block with."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Records that came together, how many bytes they had, and where the stream stands after them."""

    records: tuple[Found | Bad, ...]
    read_bytes: int
    position: Position


class Reader(ABC):
    """A stream that is open."""

    read_bytes: int = 0
    """Of the records so far."""

    @property
    @abstractmethod
    def position(self) -> Position:
        """Where the stream stands after the record that came last."""

    @abstractmethod
    def arrivals(self) -> Iterator[Found | Bad | None]:
        """Yields records as they come, and None when there was none for a moment; ends where the stream ends.

        Raises DataError for another stream than stood at the position that it was opened at, and StorageError.
        """

    def committed(self, position: Position) -> None:
        """Hears that all up to a position is kept, for whoever looks on; nothing depends on it."""
        return

    def at_end(self) -> bool:
        """Tells whether nothing comes because all has come; raises a StorageError if the stream is out of reach."""
        return True  # what is in a pipe comes at once


class Stream(Source):
    """A stream, as a config describes it. It is no source whose pieces can be listed, and says so where it is one."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What is read, whichever way there: streams of the same name are the same stream."""

    @abstractmethod
    def open(self, position: Position) -> AbstractContextManager[Reader]:
        """Opens it where it stood; ConfigError for wrong settings, StorageError if it cannot be reached."""

    @override
    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        raise ConfigError(f"source={self.name}: is a stream, which has no end to prepare up to; add --follow")

    @override
    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        raise ConfigError(f"source={self.name}: is a stream, which has no end to prepare up to; add --follow")


def blocks(
    reader: Reader, block_bytes: int, *, stopping: Callable[[], bool], wait_s: float = WAIT_S
) -> Iterator[Block | None]:
    """Gathers records to blocks of about `block_bytes`; yields None when nothing came for a moment.

    The first record of a block waits `wait_s` for more. `stopping` is asked, at least once each `TICK_S`, whether to
    end with what has come. Raises as `Reader.arrivals`.
    """
    records: list[Found | Bad] = []
    start_bytes, first_s = reader.read_bytes, 0.0

    def block() -> Block:
        read_bytes = reader.read_bytes - start_bytes
        return Block(records=tuple(records), read_bytes=read_bytes, position=reader.position)

    for arrival in reader.arrivals():
        if arrival is not None:
            first_s = first_s if records else time.monotonic()
            records.append(arrival)
        elif not records:
            yield None
        full = reader.read_bytes - start_bytes >= block_bytes
        if records and (full or time.monotonic() - first_s >= wait_s):
            yield block()
            records, start_bytes = [], reader.read_bytes
        if stopping():
            break
    if records:
        yield block()
