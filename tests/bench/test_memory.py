"""`bench memory` and `bench mixture`: what a save, a restore and a mixture may take of a host."""

from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench import memory, mixture
from tests.bench.hub import knows_peak
from tests.servers.bucket import emulated_bucket


def test_parts_are_cases() -> None:
    assert BENCHES["memory"].parts == tuple(memory.CASES) and BENCHES["mixture"].parts == tuple(mixture.CASES)


@pytest.mark.skipif(not knows_peak(), reason="the system does not tell the peak memory of a process")
@pytest.mark.parametrize(
    "kind, megabytes, factor, fixed_mb",
    [
        # A second copy of most of 1 GB would keep within the goal, whose fixed part is 300 MB.
        pytest.param("disk", 1000, 1.3, 100, marks=pytest.mark.slow(11)),
        pytest.param("bucket", 500, memory.FACTOR, memory.FIXED_BYTES / 1e6, marks=pytest.mark.slow(13)),
    ],
)
def test_a_save_and_a_restore_take_little_more_than_the_shard(
    kind: str, megabytes: int, factor: float, fixed_mb: float, tmp_path: Path
) -> None:
    with emulated_bucket() as bucket:
        place, environment = (str(tmp_path), {}) if kind == "disk" else (bucket.url, bucket.environment)
        rows = {row["call"]: row for row in memory.rows_of(place, kind, 1, megabytes * 10**6, environment)}
    assert rows.keys() == memory.CALLS.keys()
    for call, row in rows.items():
        peak_mb = row["peak_mb"]
        assert isinstance(peak_mb, float) and megabytes <= round(peak_mb) <= factor * megabytes + fixed_mb, call


def test_a_mixture_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mixture, "SOURCES", 3)
    stores = mixture.write_stores(tmp_path)
    for paths, count in zip(stores.values(), (1, 3), strict=True):
        found = mixture.read([str(path) for path in paths], 4)
        assert len(paths) == count and found["threads"] > 0 and found["requests"] == 0 and found["batch_ms"] > 0
