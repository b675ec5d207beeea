"""`bench processes`: its cheapest part, once; the matrix of faults kills and starts processes again."""

import json
from pathlib import Path

import pytest

from launch.arguments import BENCHES
from tests.bench.processes import CASES
from tests.tiny_run import ended, start

TINY = ("model.num_layers=1", "model.hidden_size=32", "model.layers.mixer.num_heads=2", "model.layers.mlp.dim=64")


def test_command_line_lists_every_part() -> None:
    assert BENCHES["processes"].parts == tuple(CASES)


@pytest.mark.slow(20)
def test_a_step_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = (*TINY, "data.seq_len=16", "train.global_batch=8", "--only", "step", "--pairs", "1", "--json", str(out))
    done = ended(start("bench", "processes", *words), timeout_s=600)
    assert done.code == 0, done
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"] == "step, float32, fsdp=2"
    several_ms, one_ms = (float(row[side].removesuffix(" ms")) for side in ("several", "one"))
    assert row["ratio"] * one_ms == pytest.approx(several_ms, abs=0.1 + 0.1 * row["ratio"]), "of the rounded times"
    assert f"| {row['case']} " in done.out
