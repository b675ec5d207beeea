"""`bench parallel`: one mesh is timed once; the ratios that it expects of schedules."""

import argparse
import json
from pathlib import Path

import pytest

from tests.bench import parallel
from tests.tiny_run import launch

TINY = [
    "model.hidden_size=32",
    "model.layers.mixer.num_heads=4",
    "model.layers.mlp.dim=64",
    "model.vocab_size=64",
    "model.num_layers=1",
    "data.seq_len=16",
    "train.global_batch=8",
]


@pytest.mark.slow(20)
def test_a_mesh_is_timed(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(parallel, "DENSE_MESHES", ("tensor=2 fsdp=4",))
    out = tmp_path / "out.json"
    done = launch("bench", "parallel", *TINY, "--only", "axes", "--pairs", "1", "--json", str(out))
    assert done.code == 0, done
    (row,) = json.loads(out.read_text())["rows"]
    assert row["case"] == "tensor=2 fsdp=4" and f"| {row['case']} " in done.out
    assert row["ratio"] == pytest.approx(row["step_ms"] / row["fsdp_ms"])


def test_expected_ratios_of_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass costs two forward passes; GPipe and 1F1B have 3 of 11 idle slots on four stages."""
    monkeypatch.setattr(parallel, "_row", lambda *given, expected: (given[1], expected))
    found = {case.rpartition(", ")[2]: expected for case, expected in parallel.schedules(argparse.Namespace())}
    assert found["gpipe"] == found["1f1b"] == pytest.approx((8 + 3) / 8)
    assert found["interleaved"] == pytest.approx((2 * 8 + 3) / (2 * 8))
    assert found["zero_bubble"] == pytest.approx(1.781, abs=1e-3)
