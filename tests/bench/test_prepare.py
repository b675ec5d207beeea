import json
from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench.prepare import MAP, PREPARE, TITLES, TokenizeCase, make_cases, make_rows
from tests.refusals import refused
from tests.tiny_run import launch


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"number {number} is {number * number}\n" * 20)
    return folder


def test_parts_are_tools() -> None:
    assert BENCHES["prepare"].parts == (PREPARE, MAP) == tuple(TITLES)
    assert {case.tool for case in make_cases(None)} == {PREPARE, MAP}
    assert [case.title for case in make_cases([PREPARE])] == ["data prepare, 1 worker", "data prepare, 2 workers"]


def test_ratios_are_medians_over_rounds() -> None:
    one, two = TokenizeCase(tool=PREPARE, num_workers=1), TokenizeCase(tool=PREPARE, num_workers=2)
    other = TokenizeCase(tool=MAP, num_workers=2)
    times_s = {one: [4.0, 2.0, 3.0], two: [2.0, 2.0, 1.0], other: [3.0, 4.0, 1.0]}
    found = list(make_rows(times_s, 10**6, 10**6))
    assert [row["vs_one_worker"] for row in found] == [None, 2.0, None]
    assert [row["vs_map"] for row in found] == [None, 1.5, None]
    assert found[1]["mb_per_s"] == 0.5


def test_every_case_is_timed(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    ended = launch("bench", "prepare", "--text", str(text), "--pairs", "1", "--json", str(out))
    assert ended.code == 0, ended
    found = json.loads(out.read_text())["rows"]
    assert [row["side"] for row in found] == [case.title for case in make_cases(None)]
    assert all(f"| {row['side']} " in ended.out for row in found)


def test_missing_folder_is_an_error() -> None:
    refused(launch("bench", "prepare", "--text", "nowhere"), "root=nowhere:")
