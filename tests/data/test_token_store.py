import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.data import arrays
from jaxinfra.data.corpus import scan
from jaxinfra.data.store import SplitWriter, TokenStore, token_dtype
from jaxinfra.errors import ConfigError, DataError, StorageError

SHARD = "train/tokens/c/0"


@pytest.fixture
def copy(store_path, tmp_path):
    """A store of its own for a test that damages it."""
    return shutil.copytree(store_path, tmp_path / "copy")


def use(path):
    """What a run does with a store, and then reads all of it."""
    store = TokenStore.open(path)
    for split, info in store.manifest.splits.items():
        store.read(split, [0], info.tokens)
        store.offsets(split)


def test_the_store_holds_every_document_and_its_end(store_path, corpus):
    store, source = TokenStore.open(store_path), scan(corpus)
    tokenizer, eot_id = store.tokenizer, store.manifest.eot_id
    for split in ("train", "heldout"):
        texts = list(source.texts(source.files[split]))
        info, offsets = store.manifest.splits[split], store.offsets(split)
        tokens = store.read(split, [0], info.tokens)[0]
        assert (info.documents, info.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
        assert offsets[0] == 0
        assert offsets[-1] == info.tokens
        for text, start, end in zip(texts, offsets[:-1], offsets[1:], strict=True):
            assert tokenizer.decode(tokens[start : end - 1].tolist()) == text
            assert tokens[end - 1] == eot_id


def test_windows_are_slices_whatever_their_order(store_path):
    store = TokenStore.open(store_path)
    every = store.read("train", [0], store.manifest.splits["train"].tokens)[0]
    starts = np.random.default_rng(0).integers(0, len(every) - 33, 50)
    window_NL = store.read("train", starts, 33)
    assert window_NL.dtype == np.uint16
    assert np.array_equal(window_NL, np.stack([every[s : s + 33] for s in starts]))
    assert store.read("train", [], 33).shape == (0, 33)


@pytest.mark.parametrize(("start", "length"), [(-1, 4), (10**9, 4), (0, 10**9)])
def test_windows_outside_the_split_are_refused(store_path, start, length):
    with pytest.raises(DataError, match=r"tokens.*asked for"):
        TokenStore.open(store_path).read("train", [0, start], length)


def test_many_shards_hold_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 16)
    monkeypatch.setattr(arrays, "SHARD", 64)
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 100_000, size).tolist() for size in (0, 1, 62, 63, 64, 200, 5)]
    writer = SplitWriter(tmp_path, "train", vocab_size=100_000, eot_id=0)
    for ids in documents:
        writer.add([(ids, 7)])
    info = writer.close()
    expected = np.concatenate([np.array([*ids, 0], np.uint32) for ids in documents])
    path = str(tmp_path / "train" / "tokens")
    array = arrays.open_array(path, arrays.cache_context())
    assert np.array_equal(arrays.read_windows(array, path, [0], info.tokens)[0], expected)
    assert (info.tokens, info.documents, info.bytes) == (len(expected), 7, 49)
    assert len(list((tmp_path / "train" / "tokens" / "c").iterdir())) == -(-len(expected) // 64)


def test_the_type_leaves_a_value_that_is_no_token():
    assert token_dtype(2**16 - 1) == np.uint16
    assert token_dtype(2**16) == np.uint32


def test_a_missing_store_says_how_to_make_it(tmp_path):
    with pytest.raises(ConfigError, match=r"no token store there; make it with: make data") as caught:
        TokenStore.open(tmp_path / "none", fix="make data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", range(40))
def test_a_flipped_bit_anywhere_in_a_shard_is_found_when_it_is_read(copy, place):
    rng = np.random.default_rng(place)
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    with pytest.raises(DataError, match=SHARD) as caught:
        use(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [SHARD, "train/tokens/zarr.json", "heldout/offsets/c/0", "tokenizer.json"])
def test_a_missing_or_short_file_is_named_at_the_start(copy, name):
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=name):
        TokenStore.open(copy)
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        TokenStore.open(copy)


def test_a_shard_that_vanishes_later_is_an_error_not_zeros(copy):
    store = TokenStore.open(copy)
    (copy / SHARD).unlink()
    with pytest.raises(DataError, match=SHARD):
        store.read("train", [0], 8)


def test_verify_finds_a_file_that_was_replaced_by_another_whole_one(copy):
    TokenStore.open(copy).verify()
    path = copy / "train" / "tokens"
    store = TokenStore.open(copy)
    tokens = store.read("train", [0], store.manifest.splits["train"].tokens)[0]
    shutil.rmtree(path)
    arrays.append(arrays.create(str(path), tokens.dtype, 2**16 - 1), str(path), tokens[::-1])
    with pytest.raises(DataError, match=f"{SHARD}: does not fit its hash"):
        TokenStore.open(copy).verify()


def test_a_replaced_tokenizer_is_found(copy):
    path = copy / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"dropout":null', '"dropout":0.1 '))
    assert len(path.read_text()) == len(text)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TokenStore.open(copy)


def test_an_id_beyond_the_vocabulary_is_found(copy):
    replace(TokenStore.open(copy).manifest, vocab_size=200).write(copy)
    with pytest.raises(DataError, match="beyond the vocabulary of 200"):
        use(copy)


def test_a_damaged_or_newer_manifest_is_refused(copy):
    path = copy / "manifest.json"
    tree = json.loads(path.read_text())
    for text, words in [
        (path.read_text()[:-40], "damaged manifest"),
        ("[]", "damaged manifest"),
        (json.dumps({key: value for key, value in tree.items() if key != "splits"}), "damaged manifest"),
        (json.dumps(tree | {"format": 2}), "store format 2, this version reads format 1"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=words) as caught:
            TokenStore.open(copy)
        assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_manifest_or_tokenizer_is_found(copy):
    expected = TokenStore.open(copy).manifest
    rng = np.random.default_rng(0)
    for name in ["manifest.json", "tokenizer.json"] * 60:
        path = copy / name
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            assert TokenStore.open(copy).manifest == expected  # a changed space between values says the same
            assert name == "manifest.json"
        except DataError as error:
            assert name in str(error)
            assert "\n" not in str(error)
        path.write_bytes(content)


@pytest.mark.parametrize("status", ["PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"])
def test_storage_that_fails_is_not_called_damage(tmp_path, monkeypatch, status):
    def fail(*arguments, **options):
        raise ValueError(f"{status}: Error writing local file: No space left on device [tensorstore_spec='{{}}']")

    monkeypatch.setattr(arrays.ts, "open", fail)
    with pytest.raises(StorageError, match=f"{status}.*No space left") as caught:
        arrays.create(str(tmp_path / "a"), np.dtype(np.uint16), 0)
    assert "tensorstore_spec" not in str(caught.value)
