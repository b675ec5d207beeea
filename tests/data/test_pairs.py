"""Pairs of answers, from the recipe to the batch."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.packing import Pack
from jaxinfra.data.pairs import PairData
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.preference import Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.tokenizers import Bytes
from tests.refusals import names, problem, raises

T = 40


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    with (folder / "pairs.jsonl").open("w") as file:
        for number in range(50):
            record = {"prompt": f"{number}? ", "chosen": f"yes {number}", "rejected": "no" * (1 + number)}
            file.write(json.dumps(record) + "\n")
    recipe = Corpus(
        store=str(folder / "store"),
        source=Jsonl(root=str(folder)),
        form=Preference(template=None),
        tokenizer=Bytes(),
        validation=ByKey(fraction=0.2),
    )
    prepare(recipe, workers=1)
    return recipe


def said(tokenizer, batch, side, row):
    used = batch[f"{side}_segments"][row] > 0
    targets = batch[f"{side}_targets"][row]
    learned = batch[f"{side}_weights"][row] > 0
    whole = [int(batch[f"{side}_inputs"][row][0]), *targets[used].tolist()]
    return tokenizer.decode(whole), tokenizer.decode(targets[learned].tolist())


def test_both_sides_begin_alike_and_only_answers_are_learned(recipe):
    opened = PairData(store=recipe.store, seq_len=T).open()
    count = len(opened.train)
    assert count + len(opened.heldout()) == 50
    batch = opened.train.read(np.arange(count), weighted=False)
    assert {array.shape for array in batch.values()} == {(count, T)}
    seen = []
    for row in range(count):
        chosen, learned = said(opened.store.tokenizer, batch, "chosen", row)
        number = chosen.partition("?")[0]
        assert (chosen, learned.rstrip("\0")) == (f"{number}? yes {number}", f"yes {number}")
        rejected, learned = said(opened.store.tokenizer, batch, "rejected", row)
        assert rejected == f"{number}? {'no' * (1 + int(number))}"[-T:]  # and its end
        assert learned == ("no" * (1 + int(number)))[-(T - 1) :]  # the first is an input alone, the last target the end
        seen.append(number)
    assert len(set(seen)) == count


def test_pairs_that_are_cut_keep_their_answers_and_are_counted(recipe, caplog):
    opened = PairData(store=recipe.store, seq_len=110).open()
    assert not caplog.messages
    longest = int(opened.store.lengths("train").max()) - 1
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


def test_a_pair_that_is_repeated_is_left_out_whole(recipe, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    text = (Path(recipe.source.root) / "pairs.jsonl").read_text()
    (source / "pairs.jsonl").write_text(text + text)
    twice = replace(recipe, store=str(tmp_path / "store"), source=Jsonl(root=str(source)), dedup=Dedup())
    manifest = prepare(twice, workers=1).manifest
    assert sum(info.documents for info in manifest.splits.values()) == 100
    assert (manifest.counts.records, manifest.counts.duplicates) == (100, 100)


def test_pairs_are_no_text_and_text_is_no_pairs(recipe, store_path):
    with raises(ConfigError, f"{recipe.store} pairs"):
        TokenData(store=recipe.store).open()
    with raises(ConfigError, f"{store_path} text pairs"):
        PairData(store=str(store_path)).open()
    problem(replace(recipe, baselines=True), "baselines=true, form= use baselines=false")
    problem(replace(recipe, packs=(Pack(seq_len=8),)), "packs= pairs")
