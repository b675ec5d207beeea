"""`bench checkpoint`, with a small state: every side saves and restores the same bits."""

import json
from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench.checkpoint import SIDES, make_rows
from tests.refusals import refused
from tests.tiny_run import launch


def test_every_side_is_timed(tmp_path: Path) -> None:
    """The process of the bench compares what each side restores with the state."""
    assert BENCHES["checkpoint"].parts == tuple(SIDES)
    out = tmp_path / "out.json"
    ended = launch("bench", "checkpoint", "--megabytes", "2", "--pairs", "1", "--json", str(out))
    assert ended.code == 0 and "Floors: " in ended.out, ended
    rows = {row["side"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [title for title, _ in SIDES.values()]
    assert all(row["gb"] == pytest.approx(0.002, rel=0.15) for row in rows.values()), "what each writes of 2 MB"
    assert all(row["total_s"] >= row["blocked_ms"] / 1e3 for row in rows.values()), "a save ends after it blocked"
    refused(launch("bench", "checkpoint", "--megabytes", "0"), "--megabytes 0")


def test_ratios_are_medians_over_rounds() -> None:
    ours = [{"blocked": blocked, "total": 4.0, "restore": 1.0} for blocked in (1.0, 2.0, 3.0)]
    rounds = ((2.0, 2.0, 1.0), (2.0, 4.0, 2.0), (1.0, 8.0, 2.0))
    orbax = [{"blocked": blocked, "total": total, "restore": restore} for blocked, total, restore in rounds]
    found, other = make_rows({"jaxinfra": ours, "orbax": orbax}, {"jaxinfra": 10**9, "orbax": 10**9})
    assert (found["blocked_vs_orbax"], found["total_vs_orbax"], found["restore_vs_orbax"]) == (1.0, 1.0, 0.5)
    assert other["total_vs_orbax"] is None and found["total_vs_raw"] is None
    assert found["blocked_ms"] == pytest.approx(2000)
