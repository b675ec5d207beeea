import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = [
    "model.hidden_size=32",
    "model.layers.mixer.num_heads=4",
    "model.layers.mlp.dim=64",
    "model.vocab_size=64",
    "data.seq_len=16",
]


@pytest.mark.slow(60)
def test_every_schedule_is_timed(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "launch", "bench", "parallel", *TINY, "--only", "schedules", "--pairs", "1"]
    command += ["--json", str(out)]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    process = subprocess.run(command, cwd=repo_root, env=env, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"].rpartition(", ")[2] for row in rows] == ["gpipe", "1f1b", "interleaved", "zero_bubble"]
    assert [round(row["expected"], 3) for row in rows] == [1.375, 1.375, 1.188, 1.781]
    assert all(f"| {row['case']} " in process.stdout for row in rows)
