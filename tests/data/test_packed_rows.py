"""Rows of whole documents, from the recipe to the batch."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.data.batches import Batches, heldout_batches
from jaxinfra.data.order import Curriculum
from jaxinfra.data.packing import Pack
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.prepare.documents.chat import Chat
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.jsonl import Jsonl
from jaxinfra.prepare.tokenizers import Bytes
from tests.refusals import raises

T = 64


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents of 1 to 200 bytes, each beginning with its number."""
    folder = tmp_path_factory.mktemp("packed")
    rng = random.Random(0)
    with (folder / "text.jsonl").open("w") as file:
        for number in range(300):
            text = f"{number} " + "x" * int(200 * rng.random() ** 3)
            file.write(json.dumps({"text": text}) + "\n")
    prepare(
        Corpus(
            store=str(folder / "store"),
            source=Jsonl(root=str(folder)),
            tokenizer=Bytes(),
            validation=ByKey(fraction=0.1),
            packs=(Pack(seq_len=T), Pack(seq_len=T, by_length=True)),
        ),
        workers=1,
    )
    return str(folder / "store")


def every_batch(data, *, global_batch=4, steps=None):
    opened = data.open()
    steps = steps or -(-len(opened.train) // global_batch)
    return [
        batch
        for _, batch in Batches(
            data,
            opened.train,
            global_batch=global_batch,
            rows=slice(None),
            start_step=0,
            steps=steps,
            ids=opened.ids,
        )
    ]


@pytest.mark.parametrize("packing", ["best_fit", "best_fit_by_length"])
def test_every_token_but_the_first_of_a_document_is_a_target_once(store, packing):
    data = TokenData(store=store, seq_len=T, packing=packing)
    opened = data.open()
    rows = opened.train.read(np.arange(len(opened.train)), weighted=False)
    offsets = opened.store.offsets("train")
    tokens = opened.store.read("train", [0], offsets[-1])[0]
    expected = np.delete(tokens, offsets[:-1])
    found = rows["targets"][rows["weights"] > 0]
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert opened.store.manifest.packs[f"train/{data.pack.name}"].rows == len(opened.train)


def test_documents_of_a_row_are_kept_apart(store):
    opened = TokenData(store=store, seq_len=T, packing="best_fit").open()
    rows = opened.train.read(np.arange(len(opened.train)), weighted=False)
    eot_id = opened.store.manifest.words.eot_id
    assert (rows["segments"][rows["weights"] == 0] == 0).all()
    for inputs, targets, segments, positions in zip(
        *(rows[name] for name in ("inputs", "targets", "segments", "positions")), strict=True
    ):
        for segment in range(1, segments.max() + 1):
            own = segments == segment
            assert (positions[own] == np.arange(own.sum())).all()
            assert (inputs[own][1:] == targets[own][:-1]).all()
            assert (targets[own][:-1] != eot_id).all()


def test_an_epoch_reads_every_row_once_by_any_number_of_processes(store):
    opened = TokenData(store=store, seq_len=T, packing="best_fit", seed=5).open()
    count = len(opened.train)
    read = np.concatenate([opened.ids(step, 1) for step in range(count)])
    assert sorted(read.tolist()) == list(range(count))
    for global_batch in (2, 3, 4, 8):
        ids = np.concatenate([opened.ids(step, global_batch) for step in range(count // global_batch)])
        assert np.array_equal(ids, read[: len(ids)])


def test_a_curriculum_reads_short_documents_first_and_all_of_them_once(store):
    data = TokenData(store=store, seq_len=T, packing="best_fit_by_length", curriculum=Curriculum(buckets=4))
    opened = data.open()
    count = len(opened.train)
    read = np.concatenate([opened.ids(step, 1) for step in range(2 * count)])
    first, second = read[:count], read[count:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(count))
    rows = opened.train.read(first, weighted=False)
    longest = (rows["positions"] * (rows["segments"] > 0)).max(axis=1)
    quarters = [part.mean() for part in np.array_split(longest, 4)]
    assert quarters == sorted(quarters) and quarters[0] < quarters[-1] / 2


def test_heldout_rows_count_their_bytes(store):
    data = TokenData(store=store, seq_len=T, packing="best_fit")
    opened = data.open()
    info = opened.store.manifest.splits["heldout"]
    assert opened.heldout().n_bytes == info.bytes - info.documents  # the first byte of each follows nothing
    batches = list(heldout_batches(data, opened.heldout(), global_batch=4, rows=slice(None)))
    assert sum(batch["weights"].sum() for _, batch in batches) == info.tokens - info.documents


def test_a_length_that_was_not_packed_says_which_were(store):
    with raises(ConfigError, "65 64, 64-by-length; Pack(seq_len=65)"):
        TokenData(store=store, seq_len=65, packing="best_fit").open()
    with raises(ConfigError, "Pack(seq_len=65, by_length=True)"):
        TokenData(store=store, seq_len=65, packing="best_fit_by_length").open()


def test_only_answers_of_conversations_are_learned(tmp_path):
    with (tmp_path / "chat.jsonl").open("w") as file:
        for number in range(40):
            messages = [
                {"role": "user", "content": f"question {number} <|im_end|>"},
                {"role": "assistant", "content": f"answer {number}"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    recipe = Corpus(
        store=str(tmp_path / "store"),
        source=Jsonl(root=str(tmp_path)),
        form=Chat(),
        tokenizer=Bytes(special_tokens=("<|im_start|>", "<|im_end|>")),
        validation=ByKey(fraction=0.2),
        packs=(Pack(seq_len=256),),
    )
    manifest = prepare(recipe, workers=1).manifest
    assert manifest.masked
    for packing in ("windows", "best_fit"):
        data = TokenData(store=str(tmp_path / "store"), seq_len=256, packing=packing)
        opened = data.open()
        batch = opened.train.read(np.arange(len(opened.train)), weighted=False)
        learned = opened.tokenizer.decode(batch["targets"][batch["weights"] > 0].tolist())
        assert "answer 1" in learned and "question" not in learned
    with raises(ConfigError, "data.mask_documents=false"):
        replace(data, packing="windows", mask_documents=False).open()
