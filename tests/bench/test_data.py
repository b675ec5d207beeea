import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.bench import data, reading, token_files
from jaxinfra.bench.reading import BATCH, LENGTH, Stores
from jaxinfra.data.tokens import TokenData
from tests.tiny_run import launch

TOKENS = data.LEAST_TOKENS


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return token_files.build(tmp_path_factory.mktemp("bench"), TOKENS, records=True)


def test_every_reader_reads_windows_of_the_same_tokens(stores: Stores) -> None:
    known = {window.tobytes() for window in stores.memmap()[::LENGTH]}
    for name, reader in data.readers().items():
        batches = reader(stores)
        for _ in range(2):
            batch = next(batches)
            if "packed" in name:
                assert batch["inputs"].shape == (BATCH, LENGTH)
                continue
            rows = _windows(batch) if isinstance(batch, dict) else np.asarray(batch)
            assert rows.shape == (BATCH, LENGTH + 1)
            assert all(row.astype(np.uint16).tobytes() in known for row in rows), name
        getattr(batches, "close", lambda: None)()


def _windows(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([batch["inputs"], batch["targets"][:, -1:]], axis=1)


def test_the_store_is_one_that_a_run_reads(stores: Stores) -> None:
    opened = TokenData(store=str(stores.store), seq_len=LENGTH, packing="best_fit").open()
    assert opened.train_units == TOKENS
    assert opened.store.manifest.packs[f"train/{LENGTH}"].rows == len(opened.train)
    assert not [damage for _, _, damage in opened.store.verify() if damage is not None]


def test_the_chips_eat_what_their_flops_allow() -> None:
    assert data.eaten_tokens_per_s() == pytest.approx(0.22e6, rel=0.5)


def test_first_batch_and_growth_are_measured_in_processes_without_jax(stores: Stores) -> None:
    assert isinstance(reading.ask("first", stores), float)
    assert abs(reading.ask("growth", stores, batches=5)) < 2**30
    code = "import sys, jaxinfra.bench.reading; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_and_its_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "TURN_S", 0.01)
    out = tmp_path / "out.json"
    ended = launch("bench", "data", "--tokens", str(TOKENS), "--pairs", "1", "--only", "speed", "--json", str(out))
    assert ended.code == 0, ended.err
    found = json.loads(out.read_text())
    assert [row["reader"] for row in found["rows"]] == list(data.readers())
    for row in found["rows"]:
        assert f"| {row['reader']} " in ended.out
        assert row["cores"] == pytest.approx(1e-9 * row["cpu_ns"] * data.eaten_tokens_per_s())
