"""The benchmark that compiles finds the policies that fit, and sets its figures beside those of others."""

import json
from pathlib import Path

import pytest
from tiny_run import launch

from launch.bench.llama import OTHERS, SEQUENCES

SMALL = ("model.layers=2", "model.width=1024", "model.mlp_dim=2048", "model.heads=8", "model.vocab_size=8192")


@pytest.mark.slow
def test_a_small_model_keeps_everything(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits at once and takes more memory for that; attention runs forward once a layer, not twice."""
    monkeypatch.chdir(repo_root)
    ended = launch("bench", "llama", *SMALL, "--json", str(tmp_path / "llama.json"))
    assert ended.code == 0, ended
    rows = json.loads((tmp_path / "llama.json").read_text())["rows"]
    assert [(row["part"], row["sequences"]) for row in rows] == [(p, n) for p in ("full", "best") for n in SEQUENCES]
    full, best = rows[: len(SEQUENCES)], rows[len(SEQUENCES) :]
    for less, more in zip(full, best, strict=True):
        assert (less["remat"], more["remat"]) == ("full", "weights")
        assert (less["attention"], more["attention"]) == (4, 2)
        assert 0 < less["temporaries_gib"] < more["temporaries_gib"] and min(less["cycles"], more["cycles"]) > 0
    assert ended.out.count("| jaxinfra") == len(rows)
    assert all(other.name in ended.out for other in OTHERS)
