"""A cluster of three Kafka brokers: librdkafka's own, on loopback, in a process apart. Its topics have 4 partitions."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers.guard import guarded, wait_until

PARTITIONS = 4


def _producer(**options: object) -> Any:
    # Inside: every test process loads this file, also one that has the base dependencies alone.
    from confluent_kafka import Producer

    return Producer({**options, "log_level": 2})


def main() -> None:
    cluster = _producer(**{"test.mock.num.brokers": 3, "bootstrap.servers": "none"})
    brokers = cluster.list_topics(timeout=30).brokers.values()
    print("brokers", ",".join(f"{broker.host}:{broker.port}" for broker in brokers), flush=True)
    time.sleep(10**6)


@contextmanager
def brokers(folder: Path) -> Iterator[str]:
    """A cluster inside the block: HOST:PORT of its brokers, with commas between."""
    log = folder / "log"
    with guarded([sys.executable, __file__], log):
        yield wait_until(lambda: log.read_text().split("brokers ")[1].splitlines()[0], (OSError, IndexError), log)


def send(servers: str, topic: str, messages: Sequence[bytes | dict[str, object]]) -> None:
    """Sends messages in turns to the partitions of a topic, which is made if it is not there."""
    producer = _producer(**{"bootstrap.servers": servers})
    producer.list_topics(topic, timeout=30)
    for number, message in enumerate(messages):
        content = message if isinstance(message, bytes) else json.dumps(message).encode()
        producer.produce(topic, content, partition=number % PARTITIONS)
    assert producer.flush(30) == 0


if __name__ == "__main__":
    main()
