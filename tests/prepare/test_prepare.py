import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from jaxinfra.data.store.store import TokenStore
from jaxinfra.data.store.versions import list_versions
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders import text as text_builder
from jaxinfra.prepare.builders.select import EmptySplitError
from jaxinfra.prepare.documents.dedup import Dedup
from jaxinfra.prepare.documents.formats import Completion, Preference, Text
from jaxinfra.prepare.prepare import group_shards, prepare
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.record import SourceShard
from jaxinfra.prepare.sources.text import TextFiles
from jaxinfra.prepare.tokenizers import Bytes, TokenizerFile, TrainBpe
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import raises
from tests.stores import bytes_recipe, contents, documents, jsonl


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def lines(folder, documents, *, bad=()):
    """Writes JSON lines of random words."""
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    with (folder / "lines.jsonl").open("w") as file:
        for number in range(documents):
            text = " ".join(rng.choices(["a", "bb", "ccc", "naïve", "漢字"], k=rng.randrange(1, 60)))
            file.write("{broken\n" if number in bad else json.dumps({"text": f"{number} {text}"}) + "\n")
    return folder


def test_the_trained_tokenizer_does_not_depend_on_shard_bytes(tmp_path, monkeypatch):
    """The tokenizer is trained on a part of each long shard, so it must use shards of the default size."""
    monkeypatch.setattr(text_builder, "_SAMPLE_SHARD_CHARS", 500)
    recipe = replace(
        bytes_recipe(lines(tmp_path / "source", 400), tmp_path / "one"), tokenizer=TrainBpe(vocab_size=280)
    )
    other = replace(recipe, store=str(tmp_path / "other"), shard_bytes=1024)
    found, again = (prepare(each, workers=1).manifest for each in (recipe, other))
    assert found.tokenizer == again.tokenizer and found.fingerprint == again.fingerprint


def test_every_record_is_a_document_of_one_split(tmp_path):
    prepare(bytes_recipe(lines(tmp_path / "source", 300), tmp_path / "store", shard_bytes=1024), workers=1)
    store = TokenStore.open(tmp_path / "store")
    expected = [json.loads(line)["text"] for line in (tmp_path / "source" / "lines.jsonl").read_text().splitlines()]
    found = {split: documents(store, split) for split in ("train", "validation")}
    assert sorted(found["train"] + found["validation"]) == sorted(expected)
    assert 10 <= len(found["validation"]) <= 60
    for texts in found.values():
        assert texts == sorted(texts, key=expected.index)  # in the order of the source


def test_another_recipe_makes_a_version_beside_the_first(tmp_path):
    source = lines(tmp_path / "source", 100)
    first = prepare(bytes_recipe(source, tmp_path / "store"), workers=1)
    before = snapshot(Path(first.path))
    second = prepare(replace(bytes_recipe(source, tmp_path / "store"), validation=ByKey(fraction=0.5)), workers=1)
    assert snapshot(Path(first.path)) == before
    assert [each.fingerprint for each in list_versions(ObjectStore(tmp_path / "store"))] == [
        first.manifest.fingerprint,
        second.manifest.fingerprint,
    ]
    assert TokenStore.open(tmp_path / "store").manifest == second.manifest  # the newest
    assert TokenStore.open(tmp_path / "store", first.manifest.fingerprint[:8]).manifest == first.manifest
    assert TokenStore.open(first.path).manifest == first.manifest
    for version in ("none", ""):  # the second fits both
        with raises(ConfigError, f"data.version={version}: {tmp_path}/store 2"):
            TokenStore.open(tmp_path / "store", version)


def test_an_existing_version_that_is_prepared_again_becomes_the_newest(tmp_path):
    first = bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "store")
    second = replace(first, validation=ByKey(fraction=0.5))
    older, newer = prepare(first, workers=1), prepare(second, workers=1)
    for recipe, made, moved in ((first, older, True), (second, newer, True), (second, newer, False)):
        again = prepare(recipe, workers=1)
        assert (again.path, again.new, again.promoted) == (made.path, False, moved)
        assert TokenStore.open(tmp_path / "store").manifest == made.manifest
    assert len(list_versions(ObjectStore(tmp_path / "store"))) == 2


def test_duplicates_across_splits_are_kept_in_validation(tmp_path):
    texts = [f"text {number}" for number in range(60)]
    source = jsonl(tmp_path / "source", texts * 2).root
    recipe = bytes_recipe(source, tmp_path / "all", validation=ByKey(fraction=0.3))
    prepare(recipe, workers=1)
    prepare(replace(recipe, store=str(tmp_path / "once"), dedup=Dedup()), workers=1)
    every, once = TokenStore.open(tmp_path / "all"), TokenStore.open(tmp_path / "once")
    validation = set(documents(every, "validation"))
    assert validation & set(documents(every, "train"))
    assert sorted(documents(once, "validation")) == sorted(validation)
    assert sorted(documents(once, "train")) == sorted(set(texts) - validation)


def test_changed_files_make_a_version_beside_the_first(tmp_path):
    source = lines(tmp_path / "source", 100)
    recipe = bytes_recipe(source, tmp_path / "store")
    first = prepare(recipe, workers=1)
    with (source / "lines.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    second = prepare(recipe, workers=1)
    assert second.new and second.manifest.counts.records == first.manifest.counts.records + 1
    os.utime(source / "lines.jsonl", (1, 1))  # another time, the same text: the work is done, the version is there
    third = prepare(recipe, workers=1)
    assert third.path == second.path
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_a_folder_that_is_not_a_store_is_not_touched(tmp_path):
    source = lines(tmp_path / "source", 100)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with raises(ConfigError, f"{tmp_path}/mine"):
        prepare(bytes_recipe(source, tmp_path / "mine"))
    assert os.listdir(tmp_path / "mine") == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    prepare(bytes_recipe(source, tmp_path / "empty"), workers=1)


@pytest.mark.parametrize(("stage", "nth"), [("begin", 1), ("tokens", 20), ("store", 1), ("publish", 1)])
def test_an_interrupted_preparation_leaves_no_version_and_continues(corpus, store_path, tmp_path, stage, nth):
    recipe = replace(corpus, store=str(tmp_path / "store"), shard_bytes=1024)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, workers=1, on_progress=interrupt_at(stage, nth))
    assert os.listdir(tmp_path / "store") == [".work"]
    with raises(ConfigError, f"{tmp_path}/store"):
        TokenStore.open(tmp_path / "store")
    (parts_folder,) = (tmp_path / "store" / ".work").glob("*/parts")
    times = {path: path.stat().st_mtime_ns for path in parts_folder.iterdir()}
    seen = []

    def watch(progress):
        if progress.stage == "store":
            seen.append({path: path.stat().st_mtime_ns for path in times})

    made = prepare(recipe, workers=1, on_progress=watch)
    assert seen == [times]  # no part was made twice
    assert contents(Path(made.path))[0] == contents(store_path)[0]
    assert sorted(os.listdir(tmp_path / "store")) == sorted([made.manifest.fingerprint, "versions.json"])


KILLED = """
import os, signal, sys
from jaxinfra.prepare.prepare import prepare
from tests.stores import bytes_recipe


class Killer:
    def __init__(self, when):
        self.left, self.stage = (int(when), None) if when.isdecimal() else (0, when)

    def __call__(self, progress):
        self.left -= 1
        if progress.stage == self.stage or self.left == 0:
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    prepare(bytes_recipe(sys.argv[1], sys.argv[2], shard_bytes=4096), workers=2, on_progress=Killer(sys.argv[3]))
"""


def test_no_record_is_lost_or_repeated_after_a_kill(tmp_path):
    source, store = lines(tmp_path / "source", 2000), tmp_path / "store"
    expected = prepare(bytes_recipe(source, tmp_path / "whole"), workers=1)
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(source), str(store)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    parts_made = 0
    for when in ("2", "3", "17", "23", "store", "publish"):
        process = subprocess.run([*command, when], env=environment, start_new_session=True, timeout=600)
        assert process.returncode == -signal.SIGKILL
        assert not (store / "versions.json").exists()
        found = len(list((store / ".work").glob("*/parts/*.npz")))
        assert found >= parts_made
        parts_made = found
    assert parts_made > 40
    made = prepare(bytes_recipe(source, store, shard_bytes=4096), workers=2)
    assert contents(Path(made.path))[0] == contents(Path(expected.path))[0]


def interrupt_at(stage, nth=1):
    """Returns an `on_progress` that interrupts preparing at the n-th report of a stage."""
    seen = []

    def tell(progress):
        seen.append(progress.stage)
        if seen.count(stage) == nth:
            raise KeyboardInterrupt

    return tell


def test_parts_of_another_shard_size_are_not_reused(text_root, tmp_path):
    """Small files are the same shards with any `shard_bytes`, but are grouped into other jobs."""
    recipe = replace(bytes_recipe("none", tmp_path / "store"), source=TextFiles(root=str(text_root)))
    with pytest.raises(KeyboardInterrupt):
        prepare(replace(recipe, shard_bytes=16 * 1024), workers=1, on_progress=interrupt_at("tokens", 3))
    made = prepare(replace(recipe, shard_bytes=1024), workers=1)
    assert made.manifest.counts.records == 40
    assert made.manifest.splits == prepare(replace(recipe, store=str(tmp_path / "whole")), workers=1).manifest.splits


def test_a_version_that_was_not_listed_yet_is_listed_by_the_next_call(tmp_path, monkeypatch):
    recipe = bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "store")

    def interrupted(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ObjectStore, "atomic_update", interrupted)
        prepare(recipe, workers=1)
    assert not (tmp_path / "store" / "versions.json").exists()
    (tmp_path / "store" / "versions.json.__lock").touch()  # TensorStore writes so
    made = prepare(recipe, workers=1)
    assert TokenStore.open(tmp_path / "store").manifest.fingerprint == made.manifest.fingerprint


@pytest.mark.parametrize("other_disk", [False, True])
def test_work_dir_may_be_on_another_disk(tmp_path, monkeypatch, other_disk):
    work, rename = tmp_path / "work", Path.rename
    (work / "mine").mkdir(parents=True)

    def same_disk_alone(path, target):
        if other_disk and path.is_relative_to(work) and not Path(target).is_relative_to(work):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", same_disk_alone)
    made = prepare(
        bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "a" / "store", work_dir=str(work)), workers=1
    )
    assert all(damage is None for *_, damage in TokenStore.open(tmp_path / "a" / "store").verify())
    assert (os.listdir(work), made.manifest.counts.records) == (["mine"], 100)


def test_a_version_that_was_removed_is_made_again(tmp_path):
    recipe = bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "store")
    first = prepare(recipe, workers=1)
    (Path(first.path) / "manifest.json").unlink()
    assert prepare(recipe, workers=1).new
    shutil.rmtree(first.path)
    again = prepare(recipe, workers=1)
    assert (again.new, again.path) == (True, first.path)
    (Path(first.path) / "train" / "tokens" / "c" / "0").write_bytes(b"")
    with raises(DataError, "c/0", Path(first.path).name):
        prepare(recipe, workers=1)


def test_a_source_that_changes_while_it_is_read_makes_no_version(tmp_path):
    source = lines(tmp_path / "source", 300)
    recipe = bytes_recipe(source, tmp_path / "store", shard_bytes=1024)

    def change(progress):
        if progress.stage == "tokens" and 0 < progress.done < progress.total:
            (source / "new.jsonl").write_text(json.dumps({"text": "new"}))
            (source / "lines.jsonl").write_text(json.dumps({"text": "other"}))

    with raises(DataError, "lines.jsonl: changed"):
        prepare(recipe, workers=1, on_progress=change)
    assert os.listdir(tmp_path / "store") == [".work"]


def test_work_of_another_recipe_is_removed(tmp_path):
    left = tmp_path / "store" / ".work" / "other" / "parts"
    left.mkdir(parents=True)
    (left / "junk").write_text("junk")
    prepare(bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "store"), workers=1)
    assert ".work" not in os.listdir(tmp_path / "store")


def test_a_second_process_does_not_disturb_the_first(tmp_path):
    work = tmp_path / "store" / ".work"
    (work / "half").mkdir(parents=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with raises(ConfigError, f"{tmp_path}/store another process"):
            prepare(bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "store"))
    finally:
        os.close(lock)
    assert (work / "half").exists()


def test_too_little_disk_space_is_refused_before_tokenizing(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with raises(StorageError, f"{tmp_path}/store/ 1.0 kB work_dir=FOLDER"):
        prepare(bytes_recipe(lines(tmp_path / "source", 1000), tmp_path / "store"))


@pytest.mark.parametrize("tokenizer", [Bytes(), TrainBpe(vocab_size=300), TrainBpe(vocab_size=600)])
@pytest.mark.parametrize("format", [Text(), Completion(), Preference(template=None)])
def test_the_estimated_disk_space_is_enough(tmp_path, monkeypatch, tokenizer, format):
    asked = []
    monkeypatch.setattr("jaxinfra.prepare.prepare.check_space", lambda folder, needed, **_: asked.append(needed))
    rng, letters = random.Random(0), "etaoinshrdlu"
    words = ["".join(rng.choices(letters, k=rng.randrange(2, 9))) for _ in range(300)]
    with (tmp_path / "lines.jsonl").open("w") as file:
        for _ in range(200):
            text, prompt = (" ".join(rng.choices(words, k=60)) for _ in range(2))
            record = {"text": text, "prompt": prompt, "completion": text, "chosen": "yes", "rejected": "no"}
            used = {Text: ("text",), Completion: ("prompt", "completion"), Preference: ("prompt", "chosen", "rejected")}
            file.write(json.dumps({name: record[name] for name in used[type(format)]}) + "\n")
    recipe = replace(bytes_recipe(tmp_path, tmp_path / "store"), tokenizer=tokenizer, format=format)
    manifest = prepare(recipe, workers=1).manifest
    arrays_bytes = sum(info.tokens for info in manifest.splits.values()) * (2 + manifest.masked)
    assert [2 * arrays_bytes <= needed_bytes for needed_bytes in asked] == [True]


def test_a_store_that_cannot_be_created_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with raises(StorageError, "store="):
        prepare(bytes_recipe(lines(tmp_path / "source", 100), tmp_path / "file" / "store"))


def test_a_bad_record_is_named_and_finished_parts_are_kept(tmp_path):
    recipe = bytes_recipe(lines(tmp_path / "source", 300, bad=[250]), tmp_path / "store", shard_bytes=1024)
    with raises(DataError, "lines.jsonl:251: on_bad=skip"):
        prepare(recipe, workers=1)
    assert os.listdir(tmp_path / "store") == [".work"]
    assert len(parts.part_numbers(next((tmp_path / "store" / ".work").glob("*/parts")))) > 10


def test_the_fields_of_a_bad_record_are_named_in_one_line(tmp_path):
    (tmp_path / "lines.jsonl").write_text(json.dumps({f"a\n{number}": "" for number in range(100)}))
    with raises(DataError, "lines.jsonl:1: text; 0, 1, 19 ...;"):
        prepare(bytes_recipe(tmp_path, tmp_path / "store"), workers=1)


def test_skipped_records_are_counted_and_listed(tmp_path):
    source = lines(tmp_path / "source", 300, bad=[7, 250])
    made = prepare(bytes_recipe(source, tmp_path / "store", on_bad="skip"), workers=1)
    assert (made.manifest.counts.records, made.manifest.counts.skipped) == (300, 2)
    listed = [json.loads(line) for line in (Path(made.path) / "skipped.jsonl").read_text().splitlines()]
    assert [each["where"].rpartition(":")[2] for each in listed] == ["8", "251"]
    assert sum(info.documents for info in made.manifest.splits.values()) == 298


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_corpus_is_refused(tmp_path, text):
    (tmp_path / "lines.jsonl").write_text(text)
    with raises(EmptySplitError, "store= empty: 0 records"):
        prepare(bytes_recipe(tmp_path, tmp_path / "store"), workers=1)


def test_both_splits_must_have_documents(tmp_path):
    recipe = bytes_recipe(lines(tmp_path / "source", 20), tmp_path / "store")
    for fraction in (1e-9, 1 - 1e-9):
        with raises(EmptySplitError, f"validation=by_key validation.fraction={fraction}: "):
            prepare(replace(recipe, validation=ByKey(fraction=fraction)), workers=1)


def test_a_given_tokenizer_is_used_and_another_makes_another_version(corpus, store_path, tmp_path):
    path = tmp_path / "tokenizer.json"
    shutil.copy(store_path / "tokenizer.json", path)
    recipe = replace(corpus, store=str(tmp_path / "store"), tokenizer=TokenizerFile(path=str(path)))
    made = prepare(recipe, workers=1)
    assert made.manifest.fingerprint == store_path.name
    assert not prepare(recipe).new
    path.write_text(path.read_text().replace('"dropout":null', '"dropout":0.0'))
    other = prepare(recipe, workers=1)
    assert other.new and other.manifest.fingerprint != made.manifest.fingerprint


def test_a_damaged_part_is_found_and_made_again(tmp_path):
    recipe = bytes_recipe(lines(tmp_path / "source", 300), tmp_path / "store", shard_bytes=1024)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, workers=1, on_progress=interrupt_at("store"))
    path = sorted((tmp_path / "store" / ".work").glob("*/parts/*.npz"))[3]
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    with raises(DataError, f"{path.name}: damaged delete"):
        prepare(recipe, workers=1)
    path.unlink()
    made = prepare(recipe, workers=1)
    assert made.manifest.counts.records == 300


def test_shards_are_grouped_by_size_only():
    sizes = [10, 1, 1, 30, 2, 2, 500, 1] * 40
    shards = [SourceShard(name=str(i), size_bytes=2**20 * size, stamp="") for i, size in enumerate(sizes)]
    groups = group_shards(shards, 2**26)
    assert [shard for group in groups for shard in group] == shards
    assert all(sum(shard.size_bytes for shard in group[:-1]) < 2**26 for group in groups)
    assert 20 <= len(group_shards(shards, 2**60)) <= 40


def test_preparing_needs_no_jax():
    code = "import sys, jaxinfra.prepare.prepare, jaxinfra.data.mixing; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)
