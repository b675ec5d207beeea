"""Records from a topic of Apache Kafka: each message is a JSON object.

The reader assigns itself all partitions and starts at the offsets that the caller stored. It commits the offsets of the
consumer group, but only for tools that show the lag: it never reads them. Partitions that are added while the stream is
open are read after it is opened again.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.record import BadRecord, Record, parse_record
from jaxinfra.prepare.sources.stream import POLL_S, Position, StreamReader, StreamSource
from jaxinfra.prepare.sources.text import parse_json_object

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

BROKER_TIMEOUT_S = 60.0
"""Silence after which the brokers count as failed."""
_BATCH_MESSAGES = 1000


@dataclass(frozen=True, kw_only=True)
class Kafka(StreamSource):
    """The messages of a topic; an empty message is a bad record.

    Attributes:
        bootstrap_servers: brokers to connect to first, as HOST:PORT separated by commas.
        topic: topic whose messages are read.
        group: consumer group whose offsets are written.
        settings: path of a file with more settings of librdkafka, one `name=value` a line. Credentials belong there.
    """

    bootstrap_servers: str = ""
    topic: NonEmptyStr = ""
    group: NonEmptyStr = "jaxinfra"
    settings: str | None = None

    @property
    @override
    def name(self) -> str:
        return f"kafka:{self.topic}"  # without the brokers, whose names may change

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the fields."""
        if not re.fullmatch(r"[^,]+:\d+(,[^,]+:\d+)*", self.bootstrap_servers):
            fix = "use bootstrap_servers=HOST:9092"
            yield Problem(fields=("bootstrap_servers",), message="must be HOST:PORT, separated by commas", fix=fix)

    @contextmanager
    @override
    def open(self, position: Position) -> Iterator["_KafkaReader"]:
        kafka = import_optional("confluent_kafka", needed_by=str(self), install="jaxinfra[kafka]")
        try:
            consumer = kafka.Consumer(self._client_settings())
        except (kafka.KafkaException, ValueError) as error:
            raise ConfigError(f"{self}: {_cause(error)}; correct {self.settings or 'its fields'}") from None
        try:
            yield _KafkaReader(self, kafka, consumer, position)
        except kafka.KafkaException as error:
            raise StorageError(f"{self}: {_cause(error)}; check the brokers, then start again") from None
        finally:
            consumer.close()

    def _client_settings(self) -> dict[str, str | bool | int]:
        required: dict[str, str | bool | int] = {
            "bootstrap.servers": self.bootstrap_servers,
            "group.id": self.group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "max.poll.interval.ms": 24 * 3600 * 1000,  # nothing is polled while a version is sealed
            "log_level": 2,
        }
        if self.settings is None:
            return required
        try:
            lines = Path(self.settings).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings={self.settings}: cannot be read ({error}); use settings=PATH") from None
        pairs = [line.partition("=") for line in map(str.strip, lines) if line and not line.startswith("#")]
        if bad := [number for number, (_, sign, _) in enumerate(pairs, 1) if not sign]:
            raise ConfigError(f"settings={self.settings}: setting {bad[0]} is not name=value; write one a line")
        return {name.strip(): value.strip() for name, _, value in pairs} | required

    def __str__(self) -> str:
        return f"kafka://{self.bootstrap_servers}/{self.topic}"


class _KafkaReader(StreamReader):
    """Reads all partitions of a topic. A position maps each partition number to the offset of its next message."""

    def __init__(self, config: Kafka, kafka: ModuleType, consumer: "Consumer", position: Position):
        self._config, self._kafka, self._consumer = config, kafka, consumer
        self._offsets: dict[int, int] = {int(partition): offset for partition, offset in position.items()}
        self._at_eof = set[int]()
        partitions = self._partitions()
        if lost := sorted(set(self._offsets) - set(partitions)):
            raise DataError(f"{config}: partition {lost[0]}, which was read before, is gone; use another store")
        beginning: int = kafka.OFFSET_BEGINNING
        starts = {partition: self._offsets.get(partition, beginning) for partition in partitions}
        consumer.assign(self._topic_partitions(starts))

    @property
    @override
    def position(self) -> Position:
        return {str(partition): offset for partition, offset in sorted(self._offsets.items())}

    @override
    def on_commit(self, position: Position) -> None:
        if position:
            self._consumer.commit(offsets=self._topic_partitions(position), asynchronous=True)

    @override
    def caught_up(self) -> bool:
        return self._at_eof.issuperset(self._partitions())  # asks the brokers, so that a lost connection is an error

    @override
    def poll(self) -> Iterator[Record | BadRecord | None]:
        last_heard_s = time.monotonic()
        while True:
            first = self._consumer.poll(POLL_S)
            messages = [] if first is None else [first, *self._consumer.consume(_BATCH_MESSAGES, 0)]
            if messages:
                last_heard_s = time.monotonic()
            elif time.monotonic() - last_heard_s > BROKER_TIMEOUT_S:
                self._partitions()  # raises if the brokers do not answer
                last_heard_s = time.monotonic()
            for message in messages:
                if (error := message.error()) is not None:
                    self._handle_error(message, error)
                else:
                    yield self._to_record(message)
            if not messages:
                yield None

    def _to_record(self, message: "Message") -> Record | BadRecord:
        """Parses a message and moves the position past it."""
        partition, offset, value = message.partition() or 0, message.offset() or 0, message.value() or b""
        self._offsets[partition] = offset + 1
        self._at_eof.discard(partition)
        self.read_bytes += len(value)
        name = f"{self._config.topic}/{partition}@{offset}"
        return parse_record(parse_json_object, value, key=name, location=name)

    def _handle_error(self, message: "Message", error: "KafkaError") -> None:
        """Records the end of a partition, ignores errors after which librdkafka retries, and raises all others."""
        partition = message.partition() or 0
        if error.code() == self._kafka.KafkaError._PARTITION_EOF:
            self._at_eof.add(partition)
        elif error.code() == self._kafka.KafkaError._AUTO_OFFSET_RESET:
            raise DataError(
                f"{self._config}: partition {partition} no longer has offset {message.offset()}, the next one to read "
                "(the topic was recreated, or its retention is too short); use another store"
            )
        elif not error.retriable():
            raise self._kafka.KafkaException(error)

    def _partitions(self) -> list[int]:
        topic = self._consumer.list_topics(self._config.topic, timeout=BROKER_TIMEOUT_S).topics[self._config.topic]
        if topic.error is not None:
            raise self._kafka.KafkaException(topic.error)
        return sorted(topic.partitions)

    def _topic_partitions(self, offsets: Mapping[int, int] | Position) -> list["TopicPartition"]:
        topic = self._config.topic
        return [self._kafka.TopicPartition(topic, int(partition), offset) for partition, offset in offsets.items()]


def _cause(error: Exception) -> str:
    first = error.args[0] if error.args else ""
    return str(error) if isinstance(first, str) else first.str()
