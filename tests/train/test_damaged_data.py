"""Runs on a store with a damaged block: they stop with its name, or leave its samples out, the same way every time."""

import json
import shutil
from pathlib import Path

import pytest

from jaxinfra.data.store import arrays
from jaxinfra.data.tokens import TokenData
from jaxinfra.processes.peers import Peers
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train.skipped import SkippedSamples
from tests.refusals import names, refused
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

BLOCK, SEQ_LEN, GLOBAL_BATCH, SAVED = 64, 32, 8, 5


@pytest.fixture
def store(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with many blocks."""
    monkeypatch.setattr(arrays, "CHUNK", BLOCK)
    monkeypatch.setattr(arrays, "SHARD", 4 * BLOCK)
    path = tmp_path / "store"
    assert launch("data", "prepare", str(tiny.recipe), f"store={path}", "--workers", "1").code == 0
    return path


def make_stale(store: Path) -> tuple[int, int]:
    """Replaces a token in a block that is read late, with a CRC that fits; returns the block and the step."""
    opened = TokenData(store=str(store), seq_len=SEQ_LEN).open()
    tokens = opened.store.read("train", [0], opened.store.manifest.splits["train"].tokens)[0].copy()
    first_steps: dict[int, int] = {}
    for step in range(12):
        for start in (opened.sample_ids(step, GLOBAL_BATCH) * SEQ_LEN).tolist():
            for block in {start // BLOCK, (start + SEQ_LEN) // BLOCK}:
                first_steps.setdefault(block, step)
    block = max(first_steps, key=first_steps.__getitem__)
    tokens[block * BLOCK + 5] ^= 1
    (folder,) = store.glob("*/train/tokens")
    shutil.rmtree(folder)
    arrays.append(arrays.create(str(folder), tokens.dtype, chunk=BLOCK, shard=4 * BLOCK), str(folder), tokens)
    return block, first_steps[block]


def skipped(tiny: Tiny, name: str) -> list[dict]:
    return [json.loads(line) for line in (tiny.directory(name) / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.slow(8)
def test_a_run_stops_at_a_stale_block_and_goes_on_without_its_samples(
    tiny: Tiny, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = (f"data.store={store}", "name=one")
    block, step = make_stale(store)
    assert step >= SAVED
    line = refused(tiny.launch(*one), f"training /train/tokens/c/{block // 4}: block {block} document hash", code=78)
    names(line, "data.on_damage=skip")
    assert line.endswith("leave such samples out")

    assert 0 < len(tiny.losses("one")) <= step
    assert not (tiny.directory("one") / "skipped.jsonl").exists()

    assert tiny.launch(*one, "data.on_damage=skip").code == 0
    rows = skipped(tiny, "one")
    assert rows[0]["step"] == step + 1 and all(row["split"] == "train" for row in rows)
    assert sum(f"block {block} " in message for message in caplog.messages) == len(rows)
    metrics = read_metrics(tiny.directory("one") / "metrics.jsonl")
    counts = {int(row["step"]): row["data/skipped"] for row in metrics if "data/skipped" in row}
    assert counts[12] == sum(len(row["samples"]) for row in rows) and counts[step] == 0 < counts[step + 1]
    assert {row["eval/skipped"] for row in metrics if "eval/skipped" in row} == {0}

    two = (f"data.store={store}", "name=two", "data.on_damage=skip")
    assert tiny.launch(*two).code == 0
    assert skipped(tiny, "two") == rows and tiny.losses("two") == tiny.losses("one")


class TwoProcesses(Peers):
    """This process, and another that has left out one more sample of each step."""

    def gather(self, value, channel="main", wait_s=None):
        return [value, [[step, [samples[0] + 100]] for step, samples in value]]


class Left:
    """A loader that has left out some samples."""

    def __init__(self, left):
        self._left = left

    def take_skipped(self, end_step):
        return {step: self._left.pop(step) for step in [*self._left] if step < end_step}


def test_the_samples_of_all_processes_are_listed_and_a_resume_repeats_none(tmp_path: Path) -> None:
    loader = Left({3: [7, 8], 4: [9], 6: [1]})
    first = SkippedSamples(tmp_path, TwoProcesses(), loader, start_step=0, is_on=True)
    for step in (4, 6, 7):
        first.collect(step)
    assert first.metrics(7) == {"data/skipped": 7}
    with (tmp_path / "skipped.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "spl')  # torn by a kill
    again = SkippedSamples(tmp_path, TwoProcesses(), Left({6: [1]}), start_step=5, is_on=True)
    assert again.metrics(5) == {"data/skipped": 5}
    again.collect(7)
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(row["step"], row["samples"]) for row in rows] == [(4, [7, 8, 107]), (5, [9, 109]), (7, [1, 101])]
