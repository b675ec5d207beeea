import fcntl
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest

from jaxinfra.data.baseline import ngram_bits_per_byte, xz_bits_per_byte
from jaxinfra.data.corpus import Corpus, draw, scan
from jaxinfra.data.manifest import Baselines
from jaxinfra.data.prepare import prepare
from jaxinfra.data.store import TokenStore
from jaxinfra.errors import ConfigError, StorageError


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_same_corpus_gives_the_same_store(corpus, store_path, tmp_path):
    stages = []
    manifest = prepare(corpus, tmp_path / "deep" / "store", lambda *call: stages.append(call))
    first = TokenStore.open(store_path).manifest
    assert manifest.fingerprint == first.fingerprint
    assert replace(manifest, created=first.created) == first
    assert [stage for stage, _, _ in stages] == ["tokenizer", "tokens", "tokens", "baselines", "done"]
    assert stages[-1][1] == stages[-1][2] == sum(info.bytes for info in manifest.splits.values())
    assert os.listdir(tmp_path / "deep") == ["store"]


def test_a_prepared_store_is_left_as_it_is(corpus, store_path):
    before = snapshot(store_path)
    stages = []
    manifest = prepare(corpus, store_path, lambda *call: stages.append(call))
    assert manifest == TokenStore.open(store_path).manifest
    assert not stages
    assert snapshot(store_path) == before


def test_another_recipe_is_refused_with_both_values(corpus, store_path):
    before = snapshot(store_path)
    with pytest.raises(ConfigError, match=r"data\.corpus\.vocab_size=300 there, 400 here") as caught:
        prepare(replace(corpus, vocab_size=400), store_path)
    assert "\n" not in str(caught.value)
    assert snapshot(store_path) == before


def test_changed_files_are_refused(text_root, tmp_path):
    root = shutil.copytree(text_root, tmp_path / "text")
    recipe = Corpus(root=str(root), heldout_fraction=0.2, vocab_size=300)
    prepare(recipe, tmp_path / "store")
    (root / "part0" / "new.py").write_text("x = 1\n")
    with pytest.raises(ConfigError, match="have changed since"):
        prepare(recipe, tmp_path / "store")


def test_a_folder_with_something_else_is_not_touched(corpus, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something that is no token store"):
        prepare(corpus, tmp_path)
    assert os.listdir(tmp_path) == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    prepare(corpus, tmp_path / "empty")


@pytest.mark.parametrize("stage", ["tokenizer", "tokens", "baselines", "done"])
def test_an_end_at_any_point_leaves_no_store(corpus, tmp_path, stage):
    def stop(now, done, total):
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, tmp_path / "store", stop)
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_swept(corpus, tmp_path):
    left = tmp_path / ".store.partial" / "train"
    left.mkdir(parents=True)
    (left / "junk").write_text("junk")
    (left.parent / "manifest.json").write_text("{}")
    prepare(corpus, tmp_path / "store")
    assert os.listdir(tmp_path) == ["store"]
    TokenStore.open(tmp_path / "store").verify()


def test_a_second_process_does_not_disturb_the_first(corpus, tmp_path):
    work = tmp_path / ".store.partial"
    work.mkdir()
    (work / "half").write_text("half")
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is preparing it"):
            prepare(corpus, tmp_path / "store")
    finally:
        os.close(lock)
    assert (work / "half").exists()


def test_too_little_space_is_said_before_anything_is_written(corpus, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(StorageError, match=r"1,000 bytes free, the store needs about \d") as caught:
        prepare(corpus, tmp_path / "store")
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_made_is_a_storage_error(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="data.store="):
        prepare(corpus, tmp_path / "file" / "store")


def test_a_given_tokenizer_is_used_and_watched(corpus, store_path, tmp_path):
    path = tmp_path / "tokenizer.json"
    shutil.copy(store_path / "tokenizer.json", path)
    recipe = replace(corpus, tokenizer=str(path), vocab_size=999)
    manifest = prepare(recipe, tmp_path / "store")
    assert manifest.tokenizer_sha256 == TokenStore.open(store_path).manifest.tokenizer_sha256
    assert prepare(recipe, tmp_path / "store") == manifest
    path.write_text(path.read_text().replace('"dropout":null', '"dropout":0.5'))
    with pytest.raises(ConfigError, match=r"tokenizer\.json has changed"):
        prepare(recipe, tmp_path / "store")


def test_heldout_files_without_a_byte_have_no_baselines(tmp_path):
    root = tmp_path / "text"
    root.mkdir()
    names = [f"{letter}.py" for letter in "abcdefgh"]
    for name in names:
        (root / name).write_text("" if draw(name) < 0.5 else "x = 1\n")
    recipe = Corpus(root=str(root), heldout_fraction=0.5, vocab_size=300, min_bytes=0)
    manifest = prepare(recipe, tmp_path / "store")
    assert manifest.splits["heldout"].tokens == manifest.splits["heldout"].documents
    assert manifest.baselines == Baselines(xz_bits_per_byte=None, ngram_bits_per_byte=None)


def test_baselines_of_a_long_split_are_those_of_its_first_whole_documents(corpus, store_path, tmp_path, monkeypatch):
    store = TokenStore.open(store_path)
    whole, offsets = store.manifest, store.offsets("heldout")
    monkeypatch.setattr("jaxinfra.data.prepare.HELDOUT_LIMIT_TOKENS", whole.splits["heldout"].tokens)
    assert prepare(corpus, tmp_path / "whole").baselines == whole.baselines
    for limit, documents in [(offsets[2], 2), (offsets[2] - 1, 1), (1, 1)]:
        monkeypatch.setattr("jaxinfra.data.prepare.HELDOUT_LIMIT_TOKENS", int(limit))
        found = prepare(corpus, tmp_path / f"limit{limit}")
        assert found.fingerprint == whole.fingerprint
        source = scan(corpus)
        texts = list(source.texts(source.files["heldout"][:documents]))
        tokens = store.read("heldout", [0], offsets[documents])[0]
        assert found.baselines.xz_bits_per_byte == xz_bits_per_byte(texts)
        assert found.baselines.ngram_bits_per_byte == ngram_bits_per_byte(
            store.sample("train", 10**9),
            tokens,
            heldout_bytes=sum(len(text.encode()) for text in texts),
            vocab_size=whole.vocab_size,
            eot_id=whole.eot_id,
        )


def test_baselines_are_plausible(store_path):
    """16 words drawn at random: 4 bits a word of some 4 bytes, and nothing can do better."""
    manifest = TokenStore.open(store_path).manifest
    assert 0.8 < manifest.baselines.ngram_bits_per_byte < 2.5
    assert 0.8 < manifest.baselines.xz_bits_per_byte < 2.5


@pytest.mark.slow
def test_the_standard_library_from_files_to_baselines(tmp_path):
    manifest = prepare(Corpus(), tmp_path / "store")
    train = manifest.splits["train"]
    assert manifest.vocab_size == 8192
    assert 3 < train.bytes / train.tokens < 4.5
    assert manifest.baselines.ngram_bits_per_byte is not None
    assert 1.2 < manifest.baselines.ngram_bits_per_byte < 2.2


def test_preparing_needs_no_jax():
    code = "import sys, jaxinfra.data.prepare, jaxinfra.data.order; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
