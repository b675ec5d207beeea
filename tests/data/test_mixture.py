"""Mixtures of stores, from the config to the batch."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.config import validate
from jaxinfra.data.batches import Batches
from jaxinfra.data.mixing import MixStage
from jaxinfra.data.mixture import MixSource, Mixture
from jaxinfra.data.order import Curriculum
from jaxinfra.data.tokenizer import Bytes
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.sources.jsonl import Jsonl

T = 16


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores whose text is made of one letter each: a, b, c."""
    folder = tmp_path_factory.mktemp("mixture")
    found = []
    for letter, documents in (("a", 60), ("b", 200), ("c", 30)):
        (folder / letter).mkdir()
        with (folder / letter / "text.jsonl").open("w") as file:
            for number in range(documents):
                file.write(json.dumps({"text": letter * (20 + number % 30)}) + "\n")
        store = str(folder / f"store-{letter}")
        source = Jsonl(root=str(folder / letter))
        prepare(Corpus(store=store, source=source, tokenizer=Bytes(), heldout_fraction=0.2), workers=1)
        found.append(store)
    return found


@pytest.fixture(scope="module")
def data(stores):
    return Mixture(
        sources=tuple(MixSource(store=store) for store in stores),
        stages=(MixStage(weights=(0.5, 0.3, 0.2)), MixStage(start_step=10, weights=(0.0, 1.0, 1.0))),
        seq_len=T,
        seed=3,
    )


def batches(data, *, rows=slice(None), start_step=0, steps=30, global_batch=12):
    opened = data.open()
    return list(
        Batches(
            data,
            opened.train,
            global_batch=global_batch,
            rows=rows,
            start_step=start_step,
            steps=steps,
            ids=opened.ids,
        )
    )


def letters(batch):
    """Of which store each row is."""
    return ["abc"[int(row[row < 128].max()) - ord("a")] for row in batch["inputs"]]


def test_shares_are_those_of_the_stages(data):
    found = batches(data, steps=110)
    first = Counter(letter for _, batch in found[:10] for letter in letters(batch))
    later = Counter(letter for _, batch in found[10:] for letter in letters(batch))
    for letter, share in zip("abc", (0.5, 0.3, 0.2), strict=True):
        assert abs(first[letter] - share * 120) <= 18
    assert later["a"] == 0 and abs(later["b"] - later["c"]) <= 40


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_the_rows_of_all_processes_make_up_the_same_batches(data, processes):
    whole = batches(data)
    parts = [batches(data, rows=own) for own in np.array_split(np.arange(12), processes)]
    for index, (step, expected) in enumerate(whole):
        assert all(part[index][0] == step for part in parts)
        for name, array in expected.items():
            assert np.array_equal(array, np.concatenate([part[index][1][name] for part in parts]))


def test_a_run_that_goes_on_reads_the_same_tail(data):
    whole, tail = batches(data), batches(data, start_step=13, steps=17)
    for (step, left), (other, right) in zip(whole[13:], tail, strict=True):
        assert step == other
        assert all(np.array_equal(left[name], right[name]) for name in left)


def test_every_sample_of_a_store_is_read_once_an_epoch(data):
    opened = data.open()
    offsets = opened.train.offsets
    ids = np.concatenate([opened.ids(step, 12) for step in range(400)])
    for source in range(3):
        own = ids[(ids >= offsets[source]) & (ids < offsets[source + 1])] - offsets[source]
        count = offsets[source + 1] - offsets[source]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))


def test_heldout_samples_are_of_every_store(data):
    opened = data.open()
    every = opened.heldout()
    assert len(every) == sum(len(part.open().heldout()) for part in data.parts)
    few = opened.heldout(4)
    assert [len(part) for part in few._parts] == [2, 1, 1]
    batch = few.read(np.arange(4), weighted=True)
    assert letters(batch) == ["a", "a", "b", "c"]
    assert every.n_bytes == sum(part.open().heldout().n_bytes for part in data.parts)


def test_how_often_each_source_was_read_is_told(data):
    opened = data.open()
    read = np.concatenate([opened.ids(step, 16) for step in range(9)])
    counts = np.histogram(read, opened.train.offsets)[0] / np.diff(opened.train.offsets)
    assert [line.split()[-3] for line in opened.before(9, 16)] == [f"{epochs:.3f}" for epochs in counts]


def test_versions_are_pinned_in_the_order_of_the_sources(data):
    opened = data.open()
    pinned = data.pinned(opened.versions)
    assert [each.version for each in pinned.sources] == list(opened.versions)
    assert pinned.open().fingerprint == opened.fingerprint
    begun = replace(data.sources[0], version=opened.versions[0][:6])
    named = replace(data, sources=(begun, replace(data.sources[1], version="ab"), data.sources[2]))
    whole = [each.version for each in named.pinned(opened.versions).sources]
    assert whole == [opened.versions[0], "ab", opened.versions[2]], "a beginning becomes the whole, another one stays"
    other = replace(data.sources[1], version="none")
    message = r"^data\.sources\.1\.version=none: is not among .* \S+store-b; use data\.sources\.1\.version=none or"
    with pytest.raises(ConfigError, match=message):
        replace(data, sources=(data.sources[0], other, data.sources[2])).open()


def test_stores_of_other_tokenizers_are_refused(data, store_path):
    mixed = replace(data, sources=(data.sources[0], MixSource(store=str(store_path))), stages=())
    with pytest.raises(ConfigError, match="were made by different tokenizers"):
        mixed.open()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": (), "stages": ()}, r"sources=\(\): are none"),
        ({"stages": (MixStage(weights=(0.0, 0.0, 0.0)),)}, r"stages\.0\.weights=.*: must be finite"),
        ({"stages": (MixStage(weights=(1.0, 1.0)),)}, r"stages\.0\.weights=.*there are 3 sources and 2 weights"),
        ({"stages": (MixStage(start_step=3, weights=(1.0, 1.0, 1.0)),)}, r"stages\.0\.start_step=3"),
        ({"seq_len": 0}, "seq_len=0: .*; use seq_len=1024"),
        (
            {"curriculum": Curriculum()},
            r"curriculum=.*, sources\.0\.packing=windows: .*; use sources\.0\.packing=best_fit_by_length",
        ),
    ],
)
def test_what_cannot_be_mixed_is_said(data, change, message):
    with pytest.raises(ConfigError, match=message):
        validate(replace(data, **change))


def test_a_store_that_is_gone_names_how_to_make_it(data, stores, tmp_path):
    shutil.copytree(stores[0], tmp_path / "copy")
    gone = replace(data, sources=(data.sources[0], MixSource(store=str(tmp_path / "none"))), stages=())
    message = r"^data\.sources\.1\.store=\S+/none: no store there; make it with: python -m launch data prepare"
    with pytest.raises(ConfigError, match=message):
        gone.open()


def test_a_source_without_the_packing_is_named(data):
    unpacked = replace(data, sources=(data.sources[0], replace(data.sources[1], packing="best_fit")), stages=())
    with pytest.raises(ConfigError, match=r"^data\.sources\.1\.packing=best_fit: \S+store-b/\w+ has no rows of 16"):
        unpacked.open()
