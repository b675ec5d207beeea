"""Several processes together read hardly more from a store in a bucket than one process alone."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from jaxinfra.data.store.arrays import CHUNK
from jaxinfra.prepare.prepare import prepare
from jaxinfra.storage.objects import ObjectStore
from tests.servers.fixtures import Server
from tests.several import all_ended, several
from tests.stores import bytes_recipe
from tests.tiny_run import Tiny

CHARS = 2_000_000
CHUNK_BYTES = 2 * CHUNK
"""Size of a chunk of tokens, which is read whole."""
INDEX_BYTES = 68_000
"""Size of a shard's index and of the metadata of its array, which each process reads once."""


@pytest.fixture
def store_url(s3: Server, tmp_path: Path) -> str:
    """A store of 2 million tokens, in chunks of 4,096."""
    draw, texts = random.Random(0), tmp_path / "texts"
    texts.mkdir()
    words = [f"word{number}" for number in range(999)]
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=1250))}) for _ in range(CHARS // 10_000)]
    (texts / "all.jsonl").write_text("\n".join(rows) + "\n")
    store = ObjectStore(s3.new_url())
    store.upload(Path(prepare(bytes_recipe(texts, tmp_path / "store"), workers=1).path).parent, last=["versions.json"])
    return store.url


def read_by(count: int, tiny: Tiny, store_url: str, server: Server) -> tuple[Counter[str], Counter[str]]:
    """Trains a step on four devices of `count` processes; returns how often each object was read, and its bytes."""
    server.faults.clear()
    run = (f"data.store={store_url}", f"name=of{count}", "data.seq_len=128", "train.global_batch=64", "train.steps=1")
    run = (*run, "train.eval_samples=64", "optim.schedule.warmup_steps=0")
    with several(str(tiny.config), *run, count=count, devices=4 // count) as children:
        ends = all_ended(children)
    assert [each.code for each in ends] == [0] * count, ends
    return server.faults.gets, server.faults.read_bytes


def total(counts: Counter[str], part: str) -> int:
    return sum(number for path, number in counts.items() if part in path)


@pytest.mark.slow(40)
def test_four_processes_read_what_one_does(tiny: Tiny, store_url: str, s3: Server) -> None:
    """Manifest, tokenizer, list of versions and the check of all files are read by process 0; rows by their process.

    So are the hashes of the blocks that the rows are in.
    """
    gets, read_bytes = read_by(1, tiny, store_url, s3)
    all_gets, all_bytes = read_by(4, tiny, store_url, s3)
    shared = [path for path in gets if "/tokens/" not in path and ".blocks/" not in path]
    assert len(shared) > 10 and {path: all_gets[path] for path in shared} == {path: gets[path] for path in shared}
    assert all_gets.keys() == gets.keys()
    assert 0 < total(all_gets, ".blocks/") <= 4 * total(gets, ".blocks/")
    train, all_train = total(read_bytes, "/train/tokens/"), total(all_bytes, "/train/tokens/")
    assert train > 40 * CHUNK_BYTES
    assert train <= all_train < 1.2 * train + 3 * INDEX_BYTES
    rest = total(all_bytes, "/validation/tokens/") - total(read_bytes, "/validation/tokens/")
    assert rest < 3 * (INDEX_BYTES + 2 * CHUNK_BYTES)
