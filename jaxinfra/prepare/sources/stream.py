"""Sources without an end: records arrive in batches, each with the position of the stream after it.

A caller that stores each batch together with its position, and reopens the stream at the last stored position, gets
every record exactly once, however often it is killed.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, override

from jaxinfra.errors import ConfigError
from jaxinfra.prepare.sources.record import BadRecord, Record, Records, Source, SourceShard

Position = Mapping[str, Any]
"""Place in a stream, as JSON; {} is the beginning."""
POLL_S = 0.5
"""Longest time that a reader waits before it yields None."""
LINGER_S = 5.0
"""Longest time that a record waits for others to fill its batch."""


@dataclass(frozen=True, kw_only=True)
class StreamBatch:
    """Records that arrived together, and the position of the stream after them."""

    records: tuple[Record | BadRecord, ...]
    read_bytes: int
    position: Position


class StreamReader(ABC):
    """An open stream."""

    read_bytes: int = 0
    """Bytes of all records so far."""

    @property
    @abstractmethod
    def position(self) -> Position:
        """Position after the last record that was yielded."""

    @abstractmethod
    def poll(self) -> Iterator[Record | BadRecord | None]:
        """Yields records as they arrive, and None if none arrived for a moment; ends with the stream.

        DataError if the position was taken from another stream, StorageError if it cannot be read.
        """

    def on_commit(self, position: Position) -> None:
        """Tells the server what has been stored, for monitoring; nothing depends on it."""
        return

    def caught_up(self) -> bool:
        """Returns whether everything that was sent has been read; StorageError if the stream is out of reach."""
        return True  # a pipe delivers at once


class StreamSource(Source):
    """Config of a stream. It cannot be listed or read in shards, only followed."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Identifies the stream, independent of the address at which it is read."""

    @abstractmethod
    def open(self, position: Position) -> AbstractContextManager[StreamReader]:
        """Opens the stream at a position; ConfigError for wrong settings, StorageError if it cannot be reached."""

    @override
    def list_shards(self, shard_bytes: int) -> Sequence[SourceShard]:
        raise ConfigError(f"source={self.name}: a stream has no end to prepare up to; add --follow")

    @override
    def read(self, shard: SourceShard) -> Records:
        raise AssertionError("a stream has no shards")


def read_batches(
    reader: StreamReader, batch_bytes: int, *, should_stop: Callable[[], bool], linger_s: float = LINGER_S
) -> Iterator[StreamBatch | None]:
    """Collects records into batches of about `batch_bytes`; yields None if nothing arrived for a moment.

    The first record of a batch waits at most `linger_s` for more. `should_stop` is called at least every `POLL_S`;
    if it returns true, the batch so far is the last one. Raises as `StreamReader.poll`.
    """
    records: list[Record | BadRecord] = []
    first_s = 0.0  # when the first record of the batch arrived
    start_bytes = reader.read_bytes

    def make_batch() -> StreamBatch:
        read_bytes = reader.read_bytes - start_bytes
        return StreamBatch(records=tuple(records), read_bytes=read_bytes, position=reader.position)

    for record in reader.poll():
        if record is not None:
            if not records:
                first_s = time.monotonic()
            records.append(record)
        elif not records:
            yield None
        is_full = reader.read_bytes - start_bytes >= batch_bytes
        if records and (is_full or time.monotonic() - first_s >= linger_s):
            yield make_batch()
            records, start_bytes = [], reader.read_bytes
        if should_stop():
            break
    if records:
        yield make_batch()
