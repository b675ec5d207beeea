"""`bench sample`: the tokens a second of both sides, of a tiny model."""

import json
from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench import sample
from tests.bench.sample import MODEL
from tests.interop.torch_python import needs_torch
from tests.refusals import refused
from tests.tiny_run import launch

TINY = MODEL | {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}


@needs_torch
@pytest.mark.slow(20)
@pytest.mark.parametrize(("part", "case"), [("refill", "4 in 2 rows"), ("batch-8", "8")])
def test_both_sides_are_timed(part: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": TINY, "PROMPT": 4, "NEW": 8, "ROWS": 2, "PROMPTS": 4}.items():
        monkeypatch.setattr(sample, name, value)
    out = tmp_path / "out.json"
    ended = launch("bench", "sample", "--only", part, "--pairs", "1", "--json", str(out))
    assert ended.code == 0, ended
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"] == case and row["ratio"] == pytest.approx(row["jaxinfra"] / row["other"])


def test_cases_are_those_of_the_command() -> None:
    assert BENCHES["sample"].parts == tuple(sample.CASES)
    refused(launch("bench", "sample", "--only", "batch-7"), "--only batch-7 batch-8")
