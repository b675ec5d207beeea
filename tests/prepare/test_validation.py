"""Validation data of every kind: splits, overlap, and refused combinations."""

import random
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import override

import numpy as np
import pytest

from jaxinfra.cli.data import describe
from jaxinfra.cli.data.describe import describe_manifest
from jaxinfra.config import apply, validate
from jaxinfra.data.store.layout import LABELS
from jaxinfra.data.store.store import Store, TokenStore
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.builders.select import EmptySplitError
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.formats import Chat, Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import Corpus, ImageSet
from jaxinfra.prepare.recipes.validation import ByKey, LastDocuments, OtherStore, Tail
from jaxinfra.prepare.sources.stdin import Stdin
from jaxinfra.prepare.sources.text import Jsonl, TextFiles
from jaxinfra.prepare.tokenizers import Bytes, TokenizerFile, TrainBpe
from tests.prepare.test_prepare import interrupt_at
from tests.refusals import problem, raises, refused, suggested
from tests.stores import contents, documents, jsonl, recipe_file
from tests.tiny_run import ended, launch, start

WORDS = ["a", "bb", "naïve", "漢字", "🙂", "ccc dddd"]


def texts(count, seed=0):
    rng = random.Random(seed)
    return [f"{seed} {number} {' '.join(rng.choices(WORDS, k=rng.randrange(1, 40)))}" for number in range(count)]


@pytest.fixture
def recipe(tmp_path):
    """A recipe with 200 training texts, which take several jobs."""
    source = jsonl(tmp_path / "train", texts(200))
    return Corpus(store=str(tmp_path / "store"), source=source, tokenizer=Bytes(), shard_bytes=1024)


def splits(made):
    return documents(made.path, "train"), documents(made.path, "validation")


def talks():
    """Returns conversations and a tokenizer for them."""
    answer = {"role": "assistant", "content": "yes"}
    records = [{"messages": [{"role": "user", "content": text}, answer]} for text in texts(40)]
    return records, Bytes(special_tokens=("<|im_start|>", "<|im_end|>"))


def test_another_source_is_the_validation_split(recipe, tmp_path):
    other = jsonl(tmp_path / "val", texts(50, seed=1))
    made = prepare(replace(recipe, validation=other), workers=1)
    assert splits(made) == (texts(200), texts(50, seed=1))
    assert (made.manifest.counts.records, made.manifest.counts.overlap) == (250, 0)
    assert not prepare(replace(recipe, validation=other)).new
    jsonl(tmp_path / "val", texts(51, seed=1))
    assert prepare(replace(recipe, validation=other), workers=1).new


def test_the_tail_is_the_end_of_the_text_in_order(recipe):
    made = prepare(replace(recipe, validation=Tail(fraction=0.25)), workers=1)
    train, tail = splits(made)
    assert "".join([*train, *tail]) == "".join(texts(200))
    assert train[:-1] == texts(200)[: len(train) - 1] and tail[1:] == texts(200)[-(len(tail) - 1) :]
    info = made.manifest.splits
    assert [info[split].bytes for split in info] == [len("".join(each).encode()) for each in (train, tail)]
    assert abs(info["validation"].bytes / (info["train"].bytes + info["validation"].bytes) - 0.25) < 0.001
    assert made.manifest.counts.records == 200


@dataclass(frozen=True, kw_only=True)
class NoShards(Jsonl):
    """A source that finds nothing to read."""

    @override
    def list_shards(self, shard_bytes):
        return ()


@pytest.mark.parametrize("validation", [Tail(), LastDocuments()])
def test_the_tail_of_nothing(recipe, tmp_path, validation):
    recipe = replace(recipe, validation=validation)
    for nothing in replace(recipe, source=NoShards(root=str(tmp_path))), apply(recipe, ["filters.min_chars=100000"]):
        with raises(EmptySplitError, "store= empty source filters"):
            prepare(nothing, workers=1)


def book(folder, text):
    (folder / "book.txt").write_text(text, encoding="utf-8")
    return TextFiles(root=str(folder), pattern="*.txt")


@pytest.mark.parametrize("tokenizer", [Bytes(), TrainBpe(vocab_size=300)])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.99])
def test_one_long_document_is_split_in_two(recipe, tmp_path, tokenizer, fraction):
    text = "🙂漢字 naïve words " * 300
    recipe = replace(recipe, source=book(tmp_path, text), tokenizer=tokenizer, baselines=True)
    with raises(ConfigError, "validation=tail"):
        prepare(recipe, workers=1)
    made = prepare(apply(recipe, ["validation=tail", f"validation.fraction={fraction}"]), workers=1)
    (first,), (second,) = splits(made)
    assert first + second == text  # no character is cut
    sizes = [made.manifest.splits[split].bytes for split in ("train", "validation")]
    assert sizes == [len(first.encode()), len(second.encode())]
    assert abs(sizes[1] - fraction * sum(sizes)) <= 24  # a token, and a character that is not cut
    assert not any(damage for *_, damage in TokenStore.open(made.path).verify())


def test_the_last_documents_are_whole_where_there_are_enough(recipe):
    """The tail would begin inside a document, and the tokens of `Tail` stay where they were."""
    made = prepare(replace(recipe, validation=LastDocuments(fraction=0.1)), workers=1)
    train, last = splits(made)
    assert [*train, *last] == texts(200)
    info = made.manifest.splits
    assert abs(info["validation"].bytes / (info["train"].bytes + info["validation"].bytes) - 0.1) < 0.02


@pytest.mark.parametrize("tokenizer", [Bytes(), TrainBpe(vocab_size=300)])
@pytest.mark.parametrize(
    ("text", "ending"),
    [("🙂漢字 naïve words, and more of them\n" * 200, "\n"), ("🙂漢字 naïve words and more of them " * 200, " ")],
    ids=["at a line", "at a word"],
)
def test_a_long_document_is_cut_at_a_line_or_a_word(recipe, tmp_path, tokenizer, text, ending):
    recipe = replace(recipe, source=book(tmp_path, text), tokenizer=tokenizer)
    made = prepare(replace(recipe, validation=LastDocuments()), workers=1)
    (first,), (second,) = splits(made)
    assert first + second == text
    assert first.endswith(ending) or (ending == " " and second.startswith(" "))
    assert 0.02 < len(second) / len(text) <= 0.05 + 0.001


def test_validation_text_that_is_in_the_training_text_is_said(recipe, tmp_path):
    """Copies of a text inside other documents, and whole copies; each with what leaves it out."""
    copy = " ".join(map(str, random.Random(9).choices(range(10**6), k=200)))
    own = [" ".join(map(str, random.Random(seed).choices(range(10**6), k=40))) for seed in range(60)]
    inside = [f"{text} {copy}" for text in own]
    for written, share, fix in (
        (own, (0, 0), None),
        (
            inside,
            (0.6, 0.99),
            "against near copies of whole documents: prepare it again with dedup=dedup dedup.near=true",
        ),
        ([*own[:50], *[copy] * 10], (1, 1), "against copies of whole documents: prepare it again with dedup=dedup"),
        ([f"{' '.join(own)} {copy} {copy} {copy}"], (0.6, 1), "use validation=SOURCE of other text"),
    ):
        source = jsonl(tmp_path / f"{len(fix or '')}", written)
        made = prepare(replace(recipe, source=source, baselines=True, validation=LastDocuments()), workers=1)
        assert share[0] <= made.manifest.counts.repeated <= share[1]
        line = next((line for line in describe_manifest(made.manifest) if line.startswith("repeated")), None)
        assert (line is None) == (fix is None) and (fix or "") in (line or "")


def test_what_is_said_of_repeated_text_can_be_pasted(recipe, tmp_path, monkeypatch):
    """After `data prepare` and `data show`, with the package that is missing."""
    copy = " ".join(map(str, range(300)))
    source = jsonl(tmp_path / "texts", [*texts(60), *(f"{copy} {number}" for number in range(10))])
    path = recipe_file(tmp_path, recipe.store, source, "baselines=True")
    for words in (("prepare", path, "validation=last_documents"), ("show", recipe.store)):
        lines = launch("data", *words).out.splitlines()
        _, _, command = next(line for line in lines if line.startswith("repeated")).partition("whole documents: ")
        assert command == f"python -m launch data prepare {path} validation=last_documents dedup=dedup dedup.near=true"
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasketch", None)
        patched.setattr(describe, "find_spec", lambda name: None)
        line = next(line for line in launch("data", "show", recipe.store).out.splitlines() if "repeated " in line)
        assert line.endswith(f"whole documents: pip install 'jaxinfra[dedup]', then {command}")
        missing = launch(*shlex.split(command)[3:])
        refused(missing, "dedup.near=true: pip install 'jaxinfra[dedup]'")
        assert not missing.out  # nothing has begun
    again = launch(*shlex.split(command)[3:])
    assert again.code == 0 and "whole documents" not in again.out, again


def test_a_tokenizer_is_not_trained_on_the_tail(recipe, tmp_path):
    source = book(tmp_path, "early words " * 400 + "ЖЖЖЖЖЖ " * 100)
    recipe = replace(recipe, source=source, tokenizer=TrainBpe(vocab_size=300))
    learned = []
    for fraction in (0.5, 0.01):
        made = prepare(replace(recipe, validation=Tail(fraction=fraction)), workers=1)
        learned.append(len(TokenStore.open(made.path).tokenizer.encode("ЖЖЖЖЖЖ ")))
    assert learned[0] == 13 > learned[1]  # bytes alone


def test_conversations_and_pairs_stay_whole_in_the_tail(recipe, tmp_path):
    records, special = talks()
    fields = {"tokenizer": special, "validation": Tail(fraction=0.3)}
    made = prepare(replace(recipe, source=jsonl(tmp_path / "talks", records), format=Chat(), **fields), workers=1)
    train, tail = splits(made)
    assert len(train) + len(tail) == 40 and all(text.endswith("yes\n") for text in [*train, *tail])
    pairs = [{"prompt": text, "chosen": "yes", "rejected": "no"} for text in texts(40)]
    made = prepare(replace(recipe, source=jsonl(tmp_path / "pairs", pairs), format=Preference(), **fields), workers=1)
    found = made.manifest.splits
    assert found["train"].documents + found["validation"].documents == 80
    assert found["train"].documents % 2 == 0 and found["validation"].documents > 0


def test_a_split_of_another_store(recipe, tmp_path):
    other = replace(recipe, store=str(tmp_path / "other"), source=jsonl(tmp_path / "b", texts(80, seed=2)))
    theirs = splits(prepare(other, workers=1))
    for split, expected in zip(("train", "validation"), theirs, strict=True):
        named = replace(recipe, validation=OtherStore(store=other.store, split=split))
        made = prepare(named, workers=1)
        assert splits(made) == (texts(200), expected)
        assert made.manifest.splits["validation"].bytes == len("".join(expected).encode())
    jsonl(tmp_path / "b", [*texts(80, seed=2), *texts(200)[:9]])
    prepare(other, workers=1)
    newer = prepare(replace(named, validation=OtherStore(store=other.store, split="train")), workers=1)
    assert newer.new and newer.manifest.counts.overlap > 0  # what both have is found among tokens


def test_a_masked_store_keeps_its_mask(recipe, tmp_path):
    records, special = talks()
    source = jsonl(tmp_path / "talks", records)
    other = replace(recipe, source=source, format=Chat(), tokenizer=special, store=str(tmp_path / "other"))
    made = prepare(other, workers=1)
    again = prepare(replace(other, store=recipe.store, validation=OtherStore(store=other.store)), workers=1)
    assert again.manifest.splits["validation"] == made.manifest.splits["validation"]
    assert again.manifest.counts.overlap == made.manifest.splits["validation"].documents
    with raises(ConfigError, "validation.store="):
        prepare(replace(recipe, tokenizer=special, validation=OtherStore(store=other.store)), workers=1)


def test_a_store_of_another_tokenizer_is_refused(recipe, tmp_path):
    other = replace(recipe, tokenizer=TrainBpe(vocab_size=270), store=str(tmp_path / "other"))
    made = prepare(other, workers=1)
    named = replace(recipe, validation=OtherStore(store=other.store))
    with raises(ConfigError, "validation.store= tokenizer.json"):
        prepare(named, workers=1)
    same = TokenizerFile(path=f"{made.path}/tokenizer.json")
    assert prepare(replace(named, tokenizer=same), workers=1).manifest.splits["validation"].documents
    problem(replace(named, tokenizer=TrainBpe(vocab_size=270)), "validation= tokenizer=")
    with raises(ConfigError, f"validation.store={tmp_path}/nowhere:"):
        prepare(replace(named, validation=OtherStore(store=str(tmp_path / "nowhere"))), workers=1)


def test_the_overlap_is_counted_dropped_or_refused(recipe, tmp_path):
    mine = texts(200)
    other = jsonl(tmp_path / "val", [*texts(50, seed=1), mine[7], mine[70], mine[7]])
    recipe = replace(recipe, validation=other)
    kept = prepare(recipe, workers=1).manifest
    assert (kept.counts.overlap, kept.counts.overlap_dropped, kept.splits["train"].documents) == (3, 0, 200)
    assert any(line.startswith("overlap      3 of") for line in describe_manifest(kept))
    with raises(DataError, "on_overlap=fail: 3 of 53 on_overlap=drop") as error:
        prepare(replace(recipe, on_overlap="fail"), workers=1)
    assert str(error.value).count("all.jsonl at byte ") == 3
    made = prepare(replace(recipe, on_overlap="drop"), workers=1)
    assert (made.manifest.counts.overlap, made.manifest.counts.overlap_dropped) == (3, 2)
    assert splits(made)[0] == [text for text in mine if text not in (mine[7], mine[70])]
    assert len(splits(made)[1]) == 53
    jsonl(tmp_path / "val", texts(50, seed=1))
    assert prepare(replace(recipe, on_overlap="fail"), workers=1).new


def test_near_duplicates_count_in_the_overlap(recipe, tmp_path):
    rng = random.Random(3)
    long = [" ".join(f"w{rng.randrange(10**6)}" for _ in range(200)) for _ in range(30)]
    copies = [long[3] + " end", long[9]]
    named = {"source": jsonl(tmp_path / "long", long), "validation": jsonl(tmp_path / "val", ["one", *copies])}
    counts = {
        near: prepare(replace(recipe, dedup=dedup, **named), workers=1).manifest.counts
        for near, dedup in ((None, None), (False, Dedup()), (True, Dedup(near=True)))
    }
    assert [counts[near].overlap for near in (None, False, True)] == [1, 1, 2]
    assert [counts[near].duplicates for near in (None, False, True)] == [0, 1, 2]


def test_the_overlap_of_a_tail_with_duplicates(recipe, tmp_path):
    source = jsonl(tmp_path / "copies", texts(60) * 2)
    tail = replace(recipe, source=source, validation=Tail(fraction=0.25))
    counts = prepare(tail, workers=1).manifest.counts
    assert 20 < counts.overlap < 40
    dropped = prepare(replace(tail, on_overlap="drop"), workers=1)
    assert not set(splits(dropped)[0]) & set(splits(dropped)[1])
    alone = prepare(replace(tail, dedup=Dedup()), workers=1)
    assert alone.manifest.counts.duplicates in (59, 60)  # one may be cut by the beginning of the tail
    with raises(DataError, "on_overlap=fail: all.jsonl at byte "):
        prepare(replace(tail, on_overlap="fail"), workers=1)


@pytest.mark.parametrize("kind", ["source", "tail", "store", "key"])
@pytest.mark.parametrize("workers", [1, 2])
def test_bytes_do_not_depend_on_workers_and_shards(recipe, tmp_path, kind, workers):
    other = replace(recipe, store=str(tmp_path / "other"), source=jsonl(tmp_path / "b", texts(300, seed=2)))
    prepare(other, workers=1)
    own = {
        "source": other.source,
        "tail": Tail(fraction=0.2),
        "store": OtherStore(store=other.store),
        "key": ByKey(fraction=0.2),
    }
    recipe = replace(recipe, validation=own[kind], dedup=Dedup())
    expected = prepare(recipe, workers=1)
    files, manifest = contents(Path(expected.path))
    for shard_bytes in (3000, 10**6):
        again = replace(recipe, store=str(tmp_path / f"again-{shard_bytes}"), shard_bytes=shard_bytes)
        found, other_manifest = contents(Path(prepare(again, workers=workers).path))
        assert found == files
        assert {**manifest, "source_digest": 0} == {**other_manifest, "source_digest": 0}
    stopped = replace(recipe, store=str(tmp_path / "stopped"))
    for stage, nth in (("tokens", 9), ("publish", 1)):
        with pytest.raises(KeyboardInterrupt):
            prepare(stopped, workers=1, on_progress=interrupt_at(stage, nth))
    assert contents(Path(prepare(stopped, workers=workers).path))[0] == files


def test_an_empty_validation_source_is_refused_and_leaves_no_version(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    for root, field in (("empty", "pattern"), ("nowhere", "root")):
        with raises(ConfigError, f"validation.{field}="):
            prepare(replace(recipe, validation=Jsonl(root=str(tmp_path / root))), workers=1)
    named = replace(recipe, validation=jsonl(tmp_path / "blank", []))
    with raises(EmptySplitError, "validation: use validation=by_key"):
        prepare(named, workers=1)
    assert not list((tmp_path / "store").glob("*/manifest.json"))
    assert prepare(apply(named, ["validation=by_key"]), workers=1).new
    with raises(EmptySplitError, "source: "):
        prepare(replace(recipe, source=named.validation, validation=recipe.source), workers=1)


def test_fields_that_do_not_fit_together_are_refused(recipe):
    stream = replace(recipe, source=Stdin(), validation=Tail())
    validate(apply(stream, suggested(problem(stream, "source= validation=tail"))))
    with raises(ConfigError, "validation=stdin: by_key, tail, "):
        apply(recipe, ["validation=stdin"])
    problem(apply(recipe, ["validation=other_store"]), "validation.store=''")
    for fraction in (0, 1):
        problem(replace(recipe, validation=ByKey(fraction=fraction)), "validation.fraction=")
    assert apply(recipe, ["validation=tail", "validation.fraction=0.1"]).validation == Tail(fraction=0.1)
    assert apply(recipe, ["validation=by_key", "validation.fraction=0.1"]).validation == ByKey(fraction=0.1)
    assert apply(recipe, ["validation=text_files", "validation.root=val"]).validation == TextFiles(root="val")


def test_validation_images_of_another_source(tmp_path):
    def images(folder, first, count):
        return jsonl(tmp_path / folder, [{"image": [[n, 1]], "label": n % 3} for n in range(first, first + count)])

    recipe = ImageSet(
        store=str(tmp_path / "store"), source=images("a", 0, 60), validation=images("b", 50, 30), baselines=True
    )
    made = prepare(recipe, workers=1)
    store = Store.open(made.path)
    np.testing.assert_array_equal(store.read_all("validation", LABELS), np.arange(50, 80) % 3)
    assert (made.manifest.counts.overlap, made.manifest.splits["train"].documents) == (10, 60)
    dropped = prepare(replace(recipe, on_overlap="drop"), workers=1).manifest
    assert (dropped.counts.overlap_dropped, dropped.splits["train"].documents) == (10, 50)
    with raises(DataError, "on_overlap=fail: 10 of 30 all.jsonl:1, "):
        prepare(replace(recipe, on_overlap="fail"), workers=1)
    with raises(ConfigError, "validation=tail: by_key"):
        apply(recipe, ["validation=tail"])


def test_prepare_and_show_print_the_overlap(tmp_path):
    store, source = str(tmp_path / "store"), jsonl(tmp_path / "train", texts(50))
    path = recipe_file(tmp_path, store, repr(source))
    jsonl(tmp_path / "val", texts(50)[:2])
    validation = ("validation=jsonl", f"validation.root={tmp_path / 'val'}", "--workers", "1")
    for command in (("prepare", path, *validation), ("show", store)):
        done = ended(start("data", *command))
        assert done.code == 0 and "overlap      2 of 2 validation documents (100.0%) are in" in done.out, done
        assert "on_overlap=drop leaves them out" in done.out
    dropped = ended(start("data", "prepare", path, *validation, "on_overlap=drop"))
    assert "2 training documents dropped for it" in dropped.out and "on_overlap=drop" not in dropped.out
    dedup = ended(start("data", "prepare", path, *validation, "dedup=dedup"))
    assert "dedup has left them out of training" in dedup.out
    refused(ended(start("data", "prepare", path, *validation, "on_overlap=fail")), "on_overlap=fail:", code=78)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["local", "ray", "dask", "spark"])
def test_every_engine_gives_the_same_bytes(engine, tmp_path):
    """Runs the command, because the test process is too busy for the processes that engines start."""
    source, other = jsonl(tmp_path / "train", texts(200)), jsonl(tmp_path / "val", texts(60, seed=1))
    path = recipe_file(tmp_path, tmp_path / "one", repr(source))
    validation = ("validation=jsonl", f"validation.root={other.root}")
    made = {}
    for store, arguments in (("one", ("--workers", "1")), ("two", ("--engine", engine, "--workers", "2"))):
        command = ("data", "prepare", path, f"store={tmp_path / store}", *validation, *arguments)
        assert ended(start(*command), timeout_s=600).code == 0
        made[store] = contents(Path(TokenStore.open(tmp_path / store).storage.url))
    assert made["two"] == made["one"]
