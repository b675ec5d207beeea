import json
from pathlib import Path

import pytest

from jaxinfra.bench.prepare import OURS, THEIRS, TITLES, Side, rows, sides
from jaxinfra.cli.arguments import BENCHES
from tests.refusals import refused
from tests.tiny_run import launch


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"number {number} is {number * number}\n" * 20)
    return folder


def test_parts_are_makers() -> None:
    assert BENCHES["prepare"].parts == (OURS, THEIRS) == tuple(TITLES)
    assert {side.maker for side in sides(None)} == {OURS, THEIRS}
    assert [side.title for side in sides([OURS])] == ["data prepare, 1 worker", "data prepare, 2 workers"]


def test_ratios_are_of_turns() -> None:
    one, two = Side(maker=OURS, workers=1), Side(maker=OURS, workers=2)
    other = Side(maker=THEIRS, workers=2)
    times_s = {one: [4.0, 2.0, 3.0], two: [2.0, 2.0, 1.0], other: [3.0, 4.0, 1.0]}
    found = list(rows(times_s, 10**6, 10**6))
    assert [row["of_one_worker"] for row in found] == [None, 2.0, None]
    assert [row["of_datasets"] for row in found] == [None, 1.5, None]
    assert found[1]["mb_per_s"] == 0.5


def test_every_side_is_timed(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = launch("bench", "prepare", "--text", str(text), "--pairs", "1", "--json", str(out))
    assert ended.code == 0, ended
    found = json.loads(out.read_text())["rows"]
    assert [row["side"] for row in found] == [side.title for side in sides(None)]
    assert all(f"| {row['side']} " in ended.out for row in found)


def test_a_folder_that_is_not_there_is_a_line() -> None:
    refused(launch("bench", "prepare", "--text", "nowhere"), "root=nowhere:")
