"""Mixtures of stores, packed rows and pairs of answers, from the config to the batch."""

import json
import random
import shutil
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.batches import BatchLoader, validation_batches
from jaxinfra.data.labeled import LabeledData
from jaxinfra.data.mixing import MixStage
from jaxinfra.data.mixture import MixSource, Mixture
from jaxinfra.data.order import Curriculum
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.pairs import PairData
from jaxinfra.data.store.layout import LENGTHS, OFFSETS
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.formats import Chat, Labeled, Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.tokenizers import Bytes
from jaxinfra.track.memory import process_metrics
from tests.refusals import names, problem, raises
from tests.stores import bytes_recipe, jsonl

T = 16


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Stores whose texts each repeat one letter: a, b, c."""
    folder = tmp_path_factory.mktemp("mixture")
    found = []
    for letter, documents in (("a", 60), ("b", 200), ("c", 30)):
        source = jsonl(folder / letter, [letter * (20 + number % 30) for number in range(documents)])
        recipe = bytes_recipe(source.root, folder / f"store-{letter}", validation=ByKey(fraction=0.2))
        prepare(recipe, workers=1)
        found.append(recipe.store)
    return found


@pytest.fixture(scope="module")
def data(stores):
    return Mixture(
        sources=tuple(MixSource(store=store) for store in stores),
        stages=(MixStage(weights=(0.5, 0.3, 0.2)), MixStage(start_step=10, weights=(0.0, 1.0, 1.0))),
        seq_len=T,
        seed=3,
    )


def batches(data, *, start_step=0, steps=30):
    opened = data.open()
    options = {"global_batch": 12, "rows": slice(None), "start_step": start_step, "steps": steps}
    return list(BatchLoader(data, opened.train, sample_ids=opened.sample_ids, **options))


def letters(batch):
    """Returns the letter of each row, which names its store."""
    return ["abc"[int(row[row < 128].max()) - ord("a")] for row in batch["inputs"]]


def test_forty_sources_take_no_more_threads_and_files_than_one(data):
    def taken(mixture):
        opened = mixture.open()
        options = {"global_batch": 12, "rows": slice(None), "start_step": 0, "steps": 1000}
        with closing(iter(BatchLoader(mixture, opened.train, sample_ids=opened.sample_ids, **options))) as batches:
            for _ in range(30):
                next(batches)
            found = process_metrics()
        return {name: found[name] for name in ("threads", "open_files") if name in found}

    one = taken(replace(data, sources=data.sources[:1], stages=()))
    forty = taken(replace(data, sources=14 * data.sources, stages=()))
    assert all(forty[name] <= one[name] + 8 for name in one), (one, forty)


def test_a_damaged_store_of_a_mixture_is_named(stores, tmp_path):
    copies = [shutil.copytree(store, tmp_path / Path(store).name) for store in stores]
    data = Mixture(sources=tuple(MixSource(store=str(copy)) for copy in copies), seq_len=T)
    (damaged,) = copies[1].glob("*/train/tokens/c/0")
    content = bytearray(damaged.read_bytes())
    content[0] ^= 1
    damaged.write_bytes(content)
    with raises(DataError) as caught:
        batches(data)
    assert str(copies[1]) in str(caught.value) and "twice" in str(caught.value)


def test_stages_set_the_shares(data):
    found = batches(data, steps=110)
    first = Counter(letter for _, batch in found[:10] for letter in letters(batch))
    later = Counter(letter for _, batch in found[10:] for letter in letters(batch))
    for letter, share in zip("abc", (0.5, 0.3, 0.2), strict=True):
        assert abs(first[letter] - share * 120) <= 18
    assert later["a"] == 0 and abs(later["b"] - later["c"]) <= 40


def test_a_resumed_run_reads_the_same_batches(data):
    whole, tail = batches(data), batches(data, start_step=13, steps=17)
    for (step, left), (other, right) in zip(whole[13:], tail, strict=True):
        assert step == other
        assert all(np.array_equal(left[name], right[name]) for name in left)


def test_validation_samples_are_of_every_store(data):
    opened = data.open()
    every = opened.validation()
    assert len(every) == sum(len(part.open().validation()) for part in data.source_configs)
    few = opened.validation(4)
    assert [len(part) for part in few._parts] == [2, 1, 1]
    batch = few.read(np.arange(4), weighted=True)
    assert letters(batch) == ["a", "a", "b", "c"]
    assert every.n_bytes == sum(part.open().validation().n_bytes for part in data.source_configs)


def test_epochs_of_each_source_are_counted(data):
    opened = data.open()
    read = np.concatenate([opened.sample_ids(step, 16) for step in range(9)])
    counts = np.histogram(read, opened.train.offsets)[0] / np.diff(opened.train.offsets)
    assert [line.split()[-3] for line in opened.epochs_at(9, 16)] == [f"{epochs:.3f}" for epochs in counts]


def test_versions_apply_in_the_order_of_the_sources(data):
    opened = data.open()
    pinned = data.with_versions(opened.versions)
    assert [each.version for each in pinned.sources] == list(opened.versions)
    assert pinned.open().fingerprint == opened.fingerprint
    prefix = replace(data.sources[0], version=opened.versions[0][:6])
    named = replace(data, sources=(prefix, replace(data.sources[1], version="ab"), data.sources[2]))
    whole = [each.version for each in named.with_versions(opened.versions).sources]
    assert whole == [opened.versions[0], "ab", opened.versions[2]], (
        "a prefix becomes the whole fingerprint, another one stays"
    )
    other = replace(data.sources[1], version="none")
    with raises(ConfigError, "data.sources.1.version=none: /store-b; use data.sources.1.version=none"):
        replace(data, sources=(data.sources[0], other, data.sources[2])).open()


def test_stores_of_other_tokenizers_are_refused(data, store_path):
    mixed = replace(data, sources=(data.sources[0], MixSource(store=str(store_path))), stages=())
    with raises(ConfigError, "tokenizers"):
        mixed.open()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sources": (), "stages": ()}, "sources=():"),
        ({"stages": (MixStage(weights=(0.0, 0.0, 0.0)),)}, "stages.0.weights="),
        ({"stages": (MixStage(weights=(1.0, 1.0)),)}, "stages.0.weights= 3 2"),
        ({"stages": (MixStage(start_step=3, weights=(1.0, 1.0, 1.0)),)}, "stages.0.start_step=3"),
        ({"seq_len": 0}, "seq_len=0:"),
        ({"curriculum": Curriculum()}, "curriculum= use sources.0.packing=best_fit_by_length"),
    ],
)
def test_a_wrong_mixture_is_refused(data, change, named):
    problem(replace(data, **change), named)


def test_a_missing_store_says_how_to_prepare_it(data, stores, tmp_path):
    shutil.copytree(stores[0], tmp_path / "copy")
    gone = replace(data, sources=(data.sources[0], MixSource(store=str(tmp_path / "none"))), stages=())
    with raises(ConfigError, f"data.sources.1.store={tmp_path}/none: data prepare"):
        gone.open()


def test_a_source_without_the_packing_is_named(data):
    unpacked = replace(data, sources=(data.sources[0], replace(data.sources[1], packing="best_fit")), stages=())
    with raises(ConfigError, "data.sources.1.packing=best_fit: /store-b/ 16"):
        unpacked.open()


PACKED = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of 1 to 200 bytes that start with their number."""
    folder, rng = tmp_path_factory.mktemp("packed"), random.Random(0)
    source = jsonl(folder / "source", [f"{number} " + "x" * int(200 * rng.random() ** 3) for number in range(300)])
    packs = (PackSpec(seq_len=PACKED), PackSpec(seq_len=PACKED, by_length=True))
    prepare(bytes_recipe(source.root, folder / "store", packs=packs), workers=1)
    return str(folder / "store")


@pytest.mark.parametrize("packing", ["best_fit", "best_fit_by_length"])
def test_every_token_but_the_first_of_a_document_is_a_target_once(store, packing):
    data = TokenData(store=store, seq_len=PACKED, packing=packing)
    opened = data.open()
    rows = opened.train.read(np.arange(len(opened.train)), weighted=False)
    offsets = opened.store.read_all("train", OFFSETS)
    tokens = opened.store.read("train", [0], offsets[-1])[0]
    expected = np.delete(tokens, offsets[:-1])
    found = rows["targets"][rows["weights"] > 0]
    assert sorted(found.tolist()) == sorted(expected.tolist())
    spec = PackSpec(seq_len=PACKED, by_length=packing == "best_fit_by_length")
    assert opened.store.manifest.packs[f"train/{spec.name}"].rows == len(opened.train)


def test_a_curriculum_reads_short_documents_first_and_all_of_them_once(store):
    data = TokenData(store=store, seq_len=PACKED, packing="best_fit_by_length", curriculum=Curriculum(buckets=4))
    opened = data.open()
    count = len(opened.train)
    read = np.concatenate([opened.sample_ids(step, 1) for step in range(2 * count)])
    first, second = read[:count], read[count:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(count))
    rows = opened.train.read(first, weighted=False)
    longest = (rows["positions"] * (rows["segments"] > 0)).max(axis=1)
    quarters = [part.mean() for part in np.array_split(longest, 4)]
    assert quarters == sorted(quarters) and quarters[0] < quarters[-1] / 2


def test_validation_rows_count_their_bytes(store):
    data = TokenData(store=store, seq_len=PACKED, packing="best_fit")
    opened = data.open()
    info = opened.store.manifest.splits["validation"]
    assert opened.validation().n_bytes == info.bytes - info.documents  # the first byte of each follows nothing
    batches = list(validation_batches(data, opened.validation(), global_batch=4, rows=slice(None)))
    assert sum(batch["weights"].sum() for _, batch in batches) == info.tokens - info.documents


def test_a_missing_packing_lists_the_others(store):
    with raises(ConfigError, "65 64, 64-by-length; PackSpec(seq_len=65)"):
        TokenData(store=store, seq_len=65, packing="best_fit").open()
    with raises(ConfigError, "PackSpec(seq_len=65, by_length=True)"):
        TokenData(store=store, seq_len=65, packing="best_fit_by_length").open()


def test_only_answers_of_conversations_are_learned(tmp_path):
    talks = [(f"question {number} <|im_end|>", f"answer {number}") for number in range(40)]
    records = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in talks
    ]
    fields = {"format": Chat(), "tokenizer": Bytes(special_tokens=("<|im_start|>", "<|im_end|>"))}
    fields |= {"validation": ByKey(fraction=0.2), "packs": (PackSpec(seq_len=256),)}
    source = jsonl(tmp_path / "source", records)
    assert prepare(bytes_recipe(source.root, tmp_path / "store", **fields), workers=1).manifest.masked
    for packing in ("concat", "best_fit"):
        data = TokenData(store=str(tmp_path / "store"), seq_len=256, packing=packing)
        opened = data.open()
        batch = opened.train.read(np.arange(len(opened.train)), weighted=False)
        learned = opened.tokenizer.decode(batch["targets"][batch["weights"] > 0].tolist())
        assert "answer 1" in learned and "question" not in learned
    assert learned.count("answer") == opened.store.manifest.splits["train"].documents
    with raises(ConfigError, "data.mask_documents=false"):
        replace(data, packing="concat", mask_documents=False).open()


PAIR = 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    answers = [{"prompt": f"{n}? ", "chosen": f"yes {n}", "rejected": "no" * (1 + n)} for n in range(50)]
    source = jsonl(folder / "source", answers)
    fields = {"format": Preference(template=None), "validation": ByKey(fraction=0.2)}
    recipe = bytes_recipe(source.root, folder / "store", **fields)
    prepare(recipe, workers=1)
    return recipe


def decode_side(tokenizer, batch, side, row):
    used = batch[f"{side}_segments"][row] > 0
    targets = batch[f"{side}_targets"][row]
    learned = batch[f"{side}_weights"][row] > 0
    whole = [int(batch[f"{side}_inputs"][row][0]), *targets[used].tolist()]
    return tokenizer.decode(whole), tokenizer.decode(targets[learned].tolist())


def test_both_sides_have_the_prompt_and_only_answers_are_learned(recipe):
    opened = PairData(store=recipe.store, seq_len=PAIR).open()
    count = len(opened.train)
    assert count + len(opened.validation()) == 50
    batch = opened.train.read(np.arange(count), weighted=False)
    assert {array.shape for array in batch.values()} == {(count, PAIR)}
    seen = []
    for row in range(count):
        chosen, learned = decode_side(opened.store.tokenizer, batch, "chosen", row)
        number = chosen.partition("?")[0]
        assert (chosen, learned.rstrip("\0")) == (f"{number}? yes {number}", f"yes {number}")
        rejected, learned = decode_side(opened.store.tokenizer, batch, "rejected", row)
        assert rejected == f"{number}? {'no' * (1 + int(number))}"[-PAIR:]  # and its end
        # The first is an input alone, the last target the end.
        assert learned == ("no" * (1 + int(number)))[-(PAIR - 1) :]
        seen.append(number)
    assert len(set(seen)) == count


def test_truncated_pairs_keep_their_answers_and_are_counted(recipe, caplog):
    opened = PairData(store=recipe.store, seq_len=110).open()
    assert not caplog.messages
    longest = int(opened.store.read_all("train", LENGTHS).max()) - 1
    opened = PairData(store=recipe.store, seq_len=4).open()
    count = len(opened.train)
    (message,) = caplog.messages
    names(message, f"data.seq_len=4: {count} {opened.store} data.seq_len={longest}")
    batch = opened.train.read(np.arange(count), weighted=False)
    for side in ("chosen", "rejected"):
        assert (batch[f"{side}_weights"].sum(axis=1) > 0).all()
    caplog.clear()
    PairData(store=recipe.store, seq_len=longest).open()
    assert not caplog.messages


def test_both_documents_of_a_repeated_pair_are_left_out(recipe, tmp_path):
    records = [json.loads(line) for line in (Path(recipe.source.root) / "all.jsonl").read_text().splitlines()]
    source = jsonl(tmp_path / "source", records * 2)
    twice = replace(recipe, store=str(tmp_path / "store"), source=source, dedup=Dedup())
    manifest = prepare(twice, workers=1).manifest
    assert sum(info.documents for info in manifest.splits.values()) == 100
    assert (manifest.counts.records, manifest.counts.duplicates) == (100, 100)


def test_stores_of_pairs_and_of_text_are_not_interchangeable(recipe, store_path):
    with raises(ConfigError, f"{recipe.store} pairs"):
        TokenData(store=recipe.store).open()
    with raises(ConfigError, f"{store_path} text pairs"):
        PairData(store=str(store_path)).open()
    problem(replace(recipe, baselines=True), "baselines=true, format= use baselines=false")
    problem(replace(recipe, packs=(PackSpec(seq_len=8),)), "packs= pairs")


def test_labeled_completions_are_read_with_one_of_another_record(tmp_path):
    records = [{"prompt": f"{n}? ", "completion": f"yes {n}", "label": n % 3 > 0} for n in range(50)]
    fields = {"format": Labeled(template=None), "validation": ByKey(fraction=0.2)}
    recipe = bytes_recipe(jsonl(tmp_path / "source", records).root, tmp_path / "store", **fields)
    prepare(recipe, workers=1)
    opened = LabeledData(store=recipe.store, seq_len=40).open()
    whole = opened.train.read(np.arange(len(opened.train)), weighted=False)
    others = set()
    for row, label in enumerate(whole["label"]):
        own, learned = decode_side(opened.store.tokenizer, whole, "completion", row)
        number, mixed = own.partition("?")[0], decode_side(opened.store.tokenizer, whole, "mismatched", row)
        assert (own, learned) == (f"{number}? yes {number}", f"yes {number}") and label == (int(number) % 3 > 0)
        other = mixed[1].removeprefix("yes ")
        assert mixed[0] == f"{number}? yes {other}" and other != number
        others.add(other)
    assert len(others) == len(whole["label"]), "each completion is taken once"
    ids = np.array([7, 2])  # what a process reads of a batch does not change with the rows beside it
    for name, array in opened.train.read(ids, weighted=False).items():
        assert np.array_equal(array, whole[name][ids])
    cut = LabeledData(store=recipe.store, seq_len=3).open().train.read(ids, weighted=True)
    assert np.array_equal(cut["label"], whole["label"][ids]) and cut["mismatched_weights"].sum(axis=1).min() > 0
