"""Streams give every record once, wherever they are closed and opened again."""

import json
import os
import random
import sys
import threading
from contextlib import ExitStack
from itertools import pairwise
from types import SimpleNamespace

import pytest

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.prepare.sources import stdin as module
from jaxinfra.prepare.sources.kafka import Kafka
from jaxinfra.prepare.sources.record import BadRecord, Record
from jaxinfra.prepare.sources.stdin import Stdin
from jaxinfra.prepare.sources.stream import StreamBatch, StreamSource, read_batches
from tests.refusals import raises
from tests.servers.kafka import brokers, send

DOCUMENTS = [{"text": f"{number} " + "é" * (number % 50)} for number in range(300)]
LINES = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in DOCUMENTS).encode()


@pytest.fixture
def pipe(monkeypatch):
    """Returns a function that sends chunks of bytes to standard input and closes it."""
    threads, opened = [], []

    def sent(*chunks):
        out, into = os.pipe()

        def write():
            with os.fdopen(into, "wb", buffering=0) as file:
                for chunk in chunks:
                    file.write(chunk)

        threads.append(threading.Thread(target=write))
        threads[-1].start()
        opened.append(os.fdopen(out))
        monkeypatch.setattr("sys.stdin", opened[-1])

    yield sent
    for thread, file in zip(threads, opened, strict=True):
        thread.join()
        file.close()


def read(stream: StreamSource, position, batch_bytes=10**6, at_most=10**9) -> list[StreamBatch]:
    """Reads the batches of a stream up to its end, or until nothing arrives for a second."""
    found, quiet = [], 0
    with stream.open(position) as reader:
        for batch in read_batches(reader, batch_bytes, should_stop=lambda: len(found) >= at_most, linger_s=0.1):
            if batch is not None:
                found.append(batch)
            quiet = quiet + 1 if batch is None else 0
            if quiet == 2:
                break
    return found[:at_most]


def texts(found: list[StreamBatch]):
    return [each.fields for batch in found for each in batch.records if isinstance(each, Record)]


@pytest.mark.parametrize("cuts", [[], [1, 2, 3], [len(LINES) - 1], list(range(0, len(LINES), 7))])
def test_lines_are_read_however_they_are_chunked(pipe, cuts):
    pipe(*(LINES[a:b] for a, b in pairwise([0, *cuts, len(LINES)])))
    assert texts(read(Stdin(), {})) == DOCUMENTS


def test_standard_input_continues_at_its_position(pipe):
    rng = random.Random(0)
    position, seen = {}, []
    while len(seen) < len(DOCUMENTS):
        pipe(LINES)
        new = read(Stdin(), position, batch_bytes=rng.randrange(1, 3000), at_most=rng.randrange(1, 5))
        seen += texts(new)
        position = json.loads(json.dumps(new[-1].position))
    assert seen == DOCUMENTS
    assert position["bytes"] == len(LINES) and position["lines"] == len(DOCUMENTS)
    pipe(LINES + b'{"text": "later"}')
    assert texts(read(Stdin(), position)) == [{"text": "later"}]
    pipe(LINES)
    assert read(Stdin(), position) == []


@pytest.mark.parametrize("other", [b"", LINES[:-1], b"x" + LINES[1:], LINES.replace(b"299", b"298")])
def test_another_stream_is_refused(pipe, other):
    pipe(LINES)
    position = read(Stdin(), {})[-1].position
    pipe(other)
    with raises(DataError, f"stdin: {len(LINES)} bytes"):
        read(Stdin(), position)


def test_bad_lines_of_a_stream_are_named_by_number(pipe, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 64)
    long = b'{"text": "' + b"x" * 1000 + b'"}\n'
    pipe(b'{"text": "a"}\n\n{broken\n' + long + b'[1]\n{"text": "b"}\n' + long[:-1])
    found = [each for batch in read(Stdin(), {}) for each in batch.records]
    assert [each.location for each in found] == [f"stdin:{number}" for number in (1, 3, 4, 5, 6, 7)]
    assert [isinstance(each, BadRecord) for each in found] == [False, True, True, True, False, True]


def test_a_batch_is_yielded_after_linger_s():
    poll = [Record(key="a", location="a", fields={}), None, None]
    reader = SimpleNamespace(
        read_bytes=0, position={}, poll=lambda: iter(poll), on_commit=lambda _: None, caught_up=lambda: True
    )
    found = list(read_batches(reader, 10**6, should_stop=lambda: False, linger_s=0.0))
    assert [batch and len(batch.records) for batch in found] == [1, None, None]


@pytest.fixture
def source(kafka_servers, topic, tmp_path):
    settings = tmp_path / "client.properties"
    settings.write_text("# brokers answer soon that there is nothing\n fetch.wait.max.ms = 50\n\n")
    return Kafka(bootstrap_servers=kafka_servers, topic=topic, group=topic, settings=str(settings))


def test_a_topic_continues_at_its_position(source, kafka_servers, topic):
    send(kafka_servers, topic, DOCUMENTS)
    assert not list(source.problems())
    position, seen = {}, []
    while new := read(source, position, batch_bytes=1500, at_most=4):
        seen += [each for batch in new for each in batch.records]
        position = json.loads(json.dumps(new[-1].position))
    assert sorted(each.fields["text"] for each in seen) == sorted(each["text"] for each in DOCUMENTS)
    assert len({each.key for each in seen}) == len(DOCUMENTS)
    assert position == {str(number): 75 for number in range(4)}
    send(kafka_servers, topic, [{"text": "later"}])
    assert texts(read(source, position)) == [{"text": "later"}]


def test_caught_up_when_everything_has_been_read(source, kafka_servers, topic):
    send(kafka_servers, topic, DOCUMENTS[:8])
    with source.open({}) as reader:
        assert not reader.caught_up()
        poll = reader.poll()
        assert sum(next(poll) is not None for _ in range(8)) <= 8
        for _ in range(20):
            if next(poll) is None and reader.caught_up():
                break
        assert reader.caught_up() and sum(reader.position.values()) == 8
        send(kafka_servers, topic, DOCUMENTS[:1])
        while next(poll) is None:
            pass
        assert sum(reader.position.values()) == 9 and not reader.caught_up()


def test_group_offsets_are_written_and_never_read(source, kafka_servers, topic):
    from confluent_kafka import Consumer, TopicPartition

    send(kafka_servers, topic, DOCUMENTS[:8])
    with source.open({}) as reader:
        reader.on_commit({"0": 2, "3": 1})
    consumer = Consumer({"bootstrap.servers": kafka_servers, "group.id": topic})
    told = consumer.committed([TopicPartition(topic, number) for number in range(4)], timeout=30)
    assert [each.offset for each in told] == [2, -1001, -1001, 1]
    consumer.close()
    assert len(texts(read(source, {}))) == 8


def test_expired_offsets_are_an_error(source, kafka_servers, topic):
    send(kafka_servers, topic, DOCUMENTS[:4])
    for position, named in (({"0": 1000}, "partition 0 1000"), ({"9": 1}, "partition 9")):
        with raises(DataError, named):
            read(source, position)


def test_brokers_that_vanish_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr("jaxinfra.prepare.sources.kafka.BROKER_TIMEOUT_S", 1.0)
    with ExitStack() as cluster:
        servers = cluster.enter_context(brokers(tmp_path))
        send(servers, "t", DOCUMENTS[:8])
        source, seen = Kafka(bootstrap_servers=servers, topic="t"), 0
        with raises(StorageError, "kafka://127 metadata"), source.open({}) as reader:
            for found in reader.poll():
                seen += found is not None
                if seen == 8:
                    cluster.close()
        with raises(StorageError, "metadata"), source.open({}):
            pass
    assert seen == 8


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with raises(ConfigError, "kafka://h:1/t: confluent_kafka jaxinfra[kafka]"):
        Kafka(bootstrap_servers="h:1", topic="t").open({}).__enter__()


def test_missing_brokers_and_topics_are_one_line(kafka_servers, monkeypatch, tmp_path):
    monkeypatch.setattr("jaxinfra.prepare.sources.kafka.BROKER_TIMEOUT_S", 1.0)
    with raises(StorageError, "kafka://127.0.0.1:1/t: metadata"):
        read(Kafka(bootstrap_servers="127.0.0.1:1", topic="t"), {})
    with raises(StorageError, "Unknown topic"):
        read(Kafka(bootstrap_servers=kafka_servers, topic="never-made"), {})
    settings = tmp_path / "client.properties"
    settings.write_text("# who\nsasl.password=sEcReT\nno.such.setting=1\n")
    with raises(ConfigError, "no.such.setting") as caught:
        read(Kafka(bootstrap_servers=kafka_servers, topic="t", settings=str(settings)), {})
    assert "sEcReT" not in str(caught.value)
