import json
import time
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.tokens import TokenData
from launch.arguments import MIN_TOKENS
from tests.bench import data
from tests.bench.commands import call_in_process, call_without_jax
from tests.bench.loader import BATCH_SIZE, SEQ_LEN, TokenFiles, first_batch_s, memory_growth_bytes
from tests.tiny_run import launch

NUM_TOKENS = MIN_TOKENS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TokenFiles:
    return data.write_token_files(tmp_path_factory.mktemp("bench"), NUM_TOKENS)


def test_all_loaders_read_windows_of_the_same_tokens(files: TokenFiles) -> None:
    known = {window.tobytes() for window in files.windows_at_every_token()[::SEQ_LEN]}
    for name, loader in data.installed_loaders().items():
        batches = loader(files)
        for _ in range(2):
            batch = next(batches)
            if "packed" in name:
                assert isinstance(batch, dict) and batch["inputs"].shape == (BATCH_SIZE, SEQ_LEN)
                continue
            rows = _windows(batch) if isinstance(batch, dict) else np.asarray(batch)
            assert rows.shape == (BATCH_SIZE, SEQ_LEN + 1)
            assert all(row.astype(np.uint16).tobytes() in known for row in rows), name
        getattr(batches, "close", lambda: None)()


def _windows(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)


def test_store_can_be_opened_by_a_run(files: TokenFiles) -> None:
    opened = TokenData(store=str(files.store), seq_len=SEQ_LEN, packing="best_fit").open()
    assert opened.train_units == NUM_TOKENS
    assert opened.store.manifest.packs[f"train/{SEQ_LEN}"].rows == len(opened.train)
    assert not [damage for _, damage in opened.store.verify() if damage is not None]


def test_required_speed_follows_from_flops() -> None:
    assert data.required_tokens_per_s() == pytest.approx(0.22e6, rel=0.5)


def test_first_batch_and_memory_growth_without_jax(files: TokenFiles) -> None:
    late_s = 3600.0
    start_s = time.time() - late_s
    first_s = call_without_jax(first_batch_s, files, start_s)
    assert late_s < first_s < time.time() - start_s, "from the given start to the first batch"
    assert abs(call_without_jax(memory_growth_bytes, files, 5)) < 2**30
    call_without_jax(exec, "import sys, tests.bench.loader; assert 'jax' not in sys.modules")
    with pytest.raises(AssertionError):
        call_in_process(exec, {}, "import sys; assert 'jax' not in sys.modules")


def test_table_and_json_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROUND_S", 0.01)
    out = tmp_path / "out.json"
    ended = launch("bench", "data", "--tokens", str(NUM_TOKENS), "--pairs", "1", "--only", "speed", "--json", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert [row["loader"] for row in found["rows"]] == list(data.installed_loaders())
    for row in found["rows"]:
        assert f"| {row['loader']} " in ended.out
        assert row["cores"] == pytest.approx(1e-9 * row["cpu_ns"] * data.required_tokens_per_s())
