import json
from pathlib import Path

import pytest

from jaxinfra.config import load
from jaxinfra.run import Run
from tests.bench import llama, merge_overrides
from tests.golden.proofs import compiled_once
from tests.tiny_run import launch

SMALL_MODEL = (
    "model.num_layers=2",
    "model.hidden_size=512",
    "model.layers.mlp.dim=1024",
    "model.layers.mixer.num_heads=4",
    "model.layers.mixer.num_kv_heads=2",
    "model.vocab_size=1024",
    "data.seq_len=1024",
    "train.compiler=default",
)


@pytest.mark.slow(30)
@pytest.mark.usefixtures("compile_cache")
def test_small_model_fits_without_remat(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without recomputation it needs more memory, and attention runs forward once per layer, not twice."""
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(llama, "BATCH_SIZES", (2,))
    batch = f"train.global_batch={2 * llama.TOPOLOGY.num_devices}"
    runs = [
        load(llama.CONFIG, merge_overrides([batch, f"model.remat={policy}", *SMALL_MODEL]), root=Run).run
        for policy in ("full", "weights")
    ]

    def small_model_fits_without_remat() -> None:
        parts = ("--only", "full", "--only", "best")
        ended = launch("bench", "llama", *SMALL_MODEL, *parts, "--json", str(tmp_path / "llama.json"))
        assert ended.code == 0, ended
        rows = json.loads((tmp_path / "llama.json").read_text())["rows"]
        full, best = rows
        assert [(row["part"], row["batch_size"], row["remat"]) for row in rows] == [
            ("full", 2, "full"),
            ("best", 2, "weights"),
        ]
        assert (full["attention"], best["attention"]) == (4, 2)
        assert full["temporaries_gib"] < best["temporaries_gib"]
        assert ended.out.count("| jaxinfra") == len(rows)
        others = [other for other in llama.OTHERS if other["batch_size"] == 2]
        assert others and ended.out.count("| plain JAX step") == len(others)

    compiled_once(*((run, llama.TOPOLOGY) for run in runs), code=[Path(llama.__file__)])(
        small_model_fits_without_remat
    )()
