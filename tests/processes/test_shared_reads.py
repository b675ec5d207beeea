"""Process 0 tells the others what it has read from a bucket; they read everything else themselves."""

import random
from collections.abc import Callable

import pytest

from jaxinfra.processes.peers import Peers
from jaxinfra.processes.shared_reads import read_by_first
from jaxinfra.storage.known_reads import ask_once
from tests.processes.test_peers import connect, together

VOCABULARY = random.Random(0).randbytes(2**25)
"""Larger than a message, and not to be compressed."""


@pytest.fixture
def three():
    peers = connect((0, 3), (1, 3), (2, 3))
    yield peers
    together(peers, lambda each: each.leave())


def reader(peers: Peers, asked: list[tuple[int, str]]) -> Callable[[str], bytes]:
    """Reads a URL, and notes who has done it."""

    def read(url: str) -> bytes:
        asked.append((peers.index, url))
        return VOCABULARY if url == "s3://b/vocabulary" else f"{peers.index}".encode()

    return lambda url: ask_once("read", url, lambda: read(url))


def test_a_bucket_is_read_once(three: list[Peers]) -> None:
    asked = list[tuple[int, str]]()

    def run(peers: Peers) -> list[bytes]:
        read = reader(peers, asked)
        with read_by_first(peers):
            return [read(url) for url in ("s3://b/vocabulary", "s3://b/newest", "s3://b/newest")]

    assert together(three, run) == [[VOCABULARY, b"0", b"0"]] * 3
    assert asked == [(0, "s3://b/vocabulary"), (0, "s3://b/newest")]


def test_a_process_reads_its_own_copy_and_local_files(three: list[Peers]) -> None:
    asked = list[tuple[int, str]]()

    def run(peers: Peers) -> list[bytes]:
        read, copy = reader(peers, asked), "s3://elsewhere/x" if peers.index == 2 else "s3://b/x"
        with read_by_first(peers):
            return [read(copy), read("/local/x")]

    assert together(three, run) == [[b"0", b"0"], [b"0", b"1"], [b"2", b"2"]]


def test_outside_nothing_is_remembered() -> None:
    alone, asked = Peers(), list[tuple[int, str]]()
    read = reader(alone, asked)
    with read_by_first(alone):
        read("s3://b/x")
    read("s3://b/x")
    assert len(asked) == 2
