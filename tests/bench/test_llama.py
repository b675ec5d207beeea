"""The benchmark that compiles finds the policies that fit, and sets its figures beside those of others."""

import json
from pathlib import Path

import pytest

from jaxinfra.bench import llama
from tests.tiny_run import launch

SMALL = (
    *(
        "model.layers=2",
        "model.width=512",
        "model.mlp_dim=1024",
        "model.heads=4",
        "model.kv_heads=2",
        "model.vocab_size=1024",
    ),
    *("data.seq_len=1024", "train.compiler=default"),
)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_cache")
def test_a_small_model_keeps_everything(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fits at once and takes more memory for that; attention runs forward once a layer, not twice."""
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(llama, "SEQUENCES", (2,))
    parts = ("--only", "full", "--only", "best")
    ended = launch("bench", "llama", *SMALL, *parts, "--json", str(tmp_path / "llama.json"))
    assert ended.code == 0, ended
    rows = json.loads((tmp_path / "llama.json").read_text())["rows"]
    less, more = rows
    assert [(row["part"], row["sequences"], row["remat"]) for row in rows] == [
        ("full", 2, "full"),
        ("best", 2, "weights"),
    ]
    assert (less["attention"], more["attention"]) == (4, 2)
    assert less["temporaries_gib"] < more["temporaries_gib"]
    assert ended.out.count("| jaxinfra") == len(rows)
    assert ended.out.count("| bare JAX step") == sum(other["sequences"] == 2 for other in llama.OTHERS) > 0
