"""`bench memory` and `bench mixture`: what a save, a restore and a mixture may take of a host."""

import argparse
import tempfile
from collections.abc import Iterator

import pytest

from launch.arguments import BENCHES
from tests.bench import memory, mixture
from tests.bench.hub import knows_peak
from tests.servers.bucket import emulated_bucket


def test_parts_are_cases() -> None:
    assert BENCHES["memory"].parts == tuple(memory.CASES) and BENCHES["mixture"].parts == tuple(mixture.CASES)


@pytest.fixture(
    params=[pytest.param("disk", marks=pytest.mark.slow(15)), pytest.param("bucket", marks=pytest.mark.slow(8))]
)
def rows(request: pytest.FixtureRequest) -> Iterator[dict]:
    """The rows of a save and a restore: of 2 GB on a disk, as with less the fixed part of the bound hides a copy."""
    with tempfile.TemporaryDirectory() as folder, emulated_bucket() as bucket:
        if request.param == "disk":
            found = memory.rows_of(f"{folder}/run", "disk", 1, 2 * 10**9, {})
        else:
            found = memory.rows_of(bucket.url, "bucket", 1, 5 * 10**8, bucket.environment)
        yield {row["call"]: row for row in found}


@pytest.mark.skipif(not knows_peak(), reason="the system does not tell the peak memory of a process")
def test_a_save_and_a_restore_take_little_more_than_the_shard(rows: dict) -> None:
    for call in memory.CALLS:
        assert rows[call]["shard_mb"] <= rows[call]["peak_mb"] <= rows[call]["goal_mb"], call


@pytest.mark.slow(12)
def test_a_mixture_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of a few batches; of the bucket only process 0 asks, and for each source equally often."""
    monkeypatch.setattr(mixture, "PROCESSES", 2)
    monkeypatch.setattr(mixture, "SOURCES", 4)
    monkeypatch.setattr(mixture, "BATCHES", {"bucket": 4})
    one, several = mixture.rows(argparse.Namespace(pairs=1), "bucket")
    assert one["requests"] > 0 and several["requests"] == 4 * one["requests"]
    assert several["threads"] <= one["threads"] + 8
