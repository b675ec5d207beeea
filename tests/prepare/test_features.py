"""The example of docs/sources.md with a real Feast: a run trains on the features that the online store serves."""

import json
import os
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
FEAST = ROOT / ".venv-feast"
NUM_ROWS = 10_000
pytestmark = [
    pytest.mark.skipif(not (FEAST / ".installed").exists(), reason="`make test-slow` installs Feast into .venv-feast"),
    pytest.mark.slow(20),
]


def day(number):
    return datetime(2026, 1, number, tzinfo=UTC)


def test_a_run_trains_on_what_the_online_store_serves(tmp_path):
    """Each customer has features of days 1, 3 and 9, and a row on day 5: those of day 3 must be taken."""
    rng = np.random.default_rng(0)
    shutil.copytree(Path(__file__).parent / "feast" / "repo", tmp_path / "repo")
    (tmp_path / "configs").mkdir()
    (example,) = re.findall(
        r"^```python\n# configs/features\.py\n(.*?)^```$", (ROOT / "docs/sources.md").read_text(), re.M | re.S
    )
    (tmp_path / "configs" / "features.py").write_text(example)
    keys = np.concatenate([rng.permutation(NUM_ROWS) for _ in range(3)])
    visits, spend = rng.integers(0, 100, 3 * NUM_ROWS), rng.normal(size=3 * NUM_ROWS).astype(np.float32)
    times = [day(number) for number in (1, 3, 9) for _ in range(NUM_ROWS)]
    features = {"customer_id": keys, "visits": visits, "spend": spend, "event_timestamp": times}
    pq.write_table(pa.table(features), tmp_path / "repo" / "activity.parquet")
    rows = {"customer_id": rng.permutation(NUM_ROWS), "churned": rng.integers(0, 2, NUM_ROWS)}
    pq.write_table(pa.table(rows | {"event_timestamp": [day(5)] * NUM_ROWS}), tmp_path / "rows.parquet")
    early = [datetime(2025, 1, 1, tzinfo=UTC)] * NUM_ROWS
    pq.write_table(pa.table(rows | {"event_timestamp": early}), tmp_path / "too_early.parquet")

    script, python = Path(__file__).parent / "feast" / "train_and_serve.py", FEAST / "bin" / "python"
    env = os.environ | {"PYTHONPATH": f"{tmp_path / 'configs'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    command = [python, script, day(1).isoformat(), day(5).isoformat()]
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended
    results, arrays = json.loads((tmp_path / "results.json").read_text()), np.load(tmp_path / "results.npz")
    on_day_3 = slice(NUM_ROWS, 2 * NUM_ROWS)
    order = np.argsort(keys[on_day_3])[rows["customer_id"]]
    expected = np.column_stack([visits[on_day_3], spend[on_day_3]]).astype(np.float32)[order]
    np.testing.assert_array_equal(arrays["trained_on"], expected)
    np.testing.assert_array_equal(arrays["served"], arrays["trained_on"])
    assert json.loads((tmp_path / "runs/features/run.json").read_text())["data"] == results["fingerprint"]
    assert results["codes"] == [0, 78]
    assert "visits: row 0" in ended.stderr
