"""Records from a topic of Apache Kafka: every message is a JSON object.

All partitions are assigned here and read from the offsets that the caller kept; what the broker knows of the group
decides nothing. It is told afterwards, for tools that show how far a group lags behind. Partitions that are added
while the stream is open are read from its next opening on.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmpty
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.packages import import_optional
from jaxinfra.prepare.sources.record import Bad, Found, read_as
from jaxinfra.prepare.sources.stream import TICK_S, Position, Reader, Stream
from jaxinfra.prepare.sources.text import json_object

REACHED_S = 60.0
"""Brokers that do not answer for so long have failed."""
_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True)
class Kafka(Stream):
    """The messages of a topic, in the order of each partition. An empty message is a record that cannot be read.

    Attributes:
        bootstrap_servers: brokers to ask first, as HOST:PORT with commas between.
        topic: its name.
        group: the name under which the brokers are told what was read.
        settings: path of a file of further settings of librdkafka, one `name=value` a line: what identifies and
            encrypts stands there, and not in a config. None is none.
    """

    bootstrap_servers: str = ""
    topic: NonEmpty = ""
    group: NonEmpty = "jaxinfra"
    settings: str | None = None

    @property
    @override
    def name(self) -> str:
        return f"kafka:{self.topic}"  # the brokers may have other names tomorrow

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        if not re.fullmatch(r"[^,]+:\d+(,[^,]+:\d+)*", self.bootstrap_servers):
            fix = "use bootstrap_servers=HOST:9092"
            yield Problem(fields=("bootstrap_servers",), message="must be HOST:PORT, with commas between", fix=fix)

    @contextmanager
    @override
    def open(self, position: Position) -> Iterator["_Reader"]:
        kafka = import_optional("confluent_kafka", needed_by=str(self), install="jaxinfra[kafka]")
        try:
            consumer = kafka.Consumer(self._settings())
        except (kafka.KafkaException, ValueError) as error:
            raise ConfigError(f"{self}: {_cause(error)}; mend {self.settings or 'its fields'}") from None
        try:
            yield _Reader(self, kafka, consumer, position)
        except kafka.KafkaException as error:
            raise StorageError(f"{self}: {_cause(error)}; see to the brokers, then start again") from None
        finally:
            consumer.close()

    def _settings(self) -> dict[str, Any]:
        own = {
            "bootstrap.servers": self.bootstrap_servers,
            "group.id": self.group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "max.poll.interval.ms": 24 * 3600 * 1000,  # sealing a version may take long
            "log_level": 2,
        }
        if self.settings is None:
            return own
        try:
            lines = Path(self.settings).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings={self.settings}: cannot be read ({error}); name a file of settings") from None
        found = [line.partition("=") for line in map(str.strip, lines) if line and not line.startswith("#")]
        if bad := [number for number, (_, sign, _) in enumerate(found, 1) if not sign]:
            raise ConfigError(f"settings={self.settings}: setting {bad[0]} is not name=value; write one a line")
        return {name.strip(): value.strip() for name, _, value in found} | own

    def __str__(self) -> str:
        return f"kafka://{self.bootstrap_servers}/{self.topic}"


class _Reader(Reader):
    """All partitions of a topic. A position has the offset of the next message of each, by its number in decimal."""

    def __init__(self, config: Kafka, kafka: Any, consumer: Any, position: Position):
        self._config, self._kafka, self._consumer = config, kafka, consumer
        self._offsets: dict[int, int] = {int(number): offset for number, offset in position.items()}
        self._ended = set[int]()
        partitions = self._partitions()
        if lost := sorted(set(self._offsets) - set(partitions)):
            raise DataError(f"{config}: partition {lost[0]}, which was read before, is gone; make another store")
        consumer.assign(self._places(dict.fromkeys(partitions, kafka.OFFSET_BEGINNING) | self._offsets))

    @property
    @override
    def position(self) -> Position:
        return {str(number): offset for number, offset in sorted(self._offsets.items())}

    @override
    def committed(self, position: Position) -> None:
        if position:
            self._consumer.commit(offsets=self._places(position), asynchronous=True)

    @override
    def at_end(self) -> bool:
        return self._ended.issuperset(self._partitions())  # asks the brokers: that they are gone is no silence

    @override
    def arrivals(self) -> Iterator[Found | Bad | None]:
        heard_s = time.monotonic()
        while True:
            first = self._consumer.poll(TICK_S)
            messages = [] if first is None else [first, *self._consumer.consume(_AT_ONCE, 0)]
            if messages:
                heard_s = time.monotonic()
            elif time.monotonic() - heard_s > REACHED_S:
                self._partitions()
                heard_s = time.monotonic()
            for message in messages:
                if message.error():
                    self._note(message)
                else:
                    yield self._record(message)
            if not messages:
                yield None

    def _record(self, message: Any) -> Found | Bad:
        """Reads what a message spells; the stream stands after it from now on."""
        number, offset, value = message.partition() or 0, message.offset() or 0, message.value() or b""
        self._offsets[number] = offset + 1
        self._ended.discard(number)
        self.read_bytes += len(value)
        name = f"{self._config.topic}/{number}@{offset}"
        return read_as(json_object, value, key=name, where=name)

    def _note(self, message: Any) -> None:
        """Takes what came in place of a message: the end of a partition, or an error; some pass by themselves."""
        error, number = message.error(), message.partition() or 0
        if error.code() == self._kafka.KafkaError._PARTITION_EOF:
            self._ended.add(number)
        elif error.code() == self._kafka.KafkaError._AUTO_OFFSET_RESET:
            raise DataError(
                f"{self._config}: partition {number} no longer has offset {message.offset()}, where it is to be read "
                "on (the topic was made anew, or keeps messages for too short); make another store"
            )
        elif not error.retriable():
            raise self._kafka.KafkaException(error)

    def _partitions(self) -> list[int]:
        topic = self._consumer.list_topics(self._config.topic, timeout=REACHED_S).topics[self._config.topic]
        if topic.error is not None:
            raise self._kafka.KafkaException(topic.error)
        return sorted(topic.partitions)

    def _places(self, offsets: Mapping[int, Any] | Position) -> list[Any]:
        topic = self._config.topic
        return [self._kafka.TopicPartition(topic, int(number), offset) for number, offset in offsets.items()]


def _cause(error: Exception) -> str:
    first = error.args[0] if error.args else ""
    return str(error) if isinstance(first, str) else first.str()
