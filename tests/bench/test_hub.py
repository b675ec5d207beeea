"""`bench hub`: what is read is written with the same bytes, and a process holds little of it besides its arrays."""

import json
from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench.hub import PARTS, SIDES, knows_peak
from tests.refusals import refused
from tests.tiny_run import launch


def bench(tmp_path: Path, *words: str) -> dict[str, dict]:
    """The rows by side. The process of the bench compares what it has written with what it has read."""
    out = tmp_path / "out.json"
    ended = launch("bench", "hub", *words, "--pairs", "1", "--json", str(out))
    assert ended.code == 0, ended
    titles = {title: side for side, title in SIDES.items()}
    return {titles[row["side"]]: row for row in json.loads(out.read_text())["rows"]}


def test_every_side_is_timed(tmp_path: Path) -> None:
    assert BENCHES["hub"].parts == PARTS
    rows = bench(tmp_path, "--megabytes", "10")
    assert list(rows) == list(SIDES)
    gigabytes = {round(row["gb_per_s"] * row["seconds"], 6) for row in rows.values()}
    assert len(gigabytes) == 1 and gigabytes.pop() == pytest.approx(0.01, rel=0.2), "each side has the same bytes"
    assert all(("memory_mb" in rows[side]) == knows_peak() for side in PARTS)
    assert set(bench(tmp_path, "--megabytes", "10", "--only", "read")) == {"read", "raw-read"}
    refused(launch("bench", "hub", "--megabytes", "0"), "--megabytes 0")


@pytest.mark.skipif(not knows_peak(), reason="the system does not tell the peak memory of a process")
@pytest.mark.slow(30)
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A gigabyte, while a process may hold twice its largest parameter and 300 MB besides its arrays."""
    rows = bench(tmp_path, "--megabytes", "1000")
    for side in PARTS:
        assert 0 < rows[side]["memory_mb"] <= rows[side]["memory_limit_mb"] < 900
