import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.store import arrays
from jaxinfra.data.store.layout import LENGTHS, OFFSETS
from jaxinfra.data.store.manifest import digest_of
from jaxinfra.data.store.store import TokenStore, token_dtype
from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.prepare.builders.writers import write_split
from jaxinfra.prepare.recipes.validation import hash_to_unit
from tests.refusals import raises

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
        store.read_all(split, OFFSETS)


def test_the_store_holds_every_document_and_its_end(store_path, corpus):
    store = TokenStore.open(store_path)
    tokenizer, eot_id = store.tokenizer, store.manifest.tokenizer_info.eot_id
    names = sorted(path.relative_to(corpus.source.root).as_posix() for path in Path(corpus.source.root).rglob("*.txt"))
    for split in ("train", "validation"):
        own = [name for name in names if (hash_to_unit(name) < corpus.validation.fraction) == (split == "validation")]
        texts = [(Path(corpus.source.root) / name).read_text(encoding="utf-8") for name in own]
        info, offsets = store.manifest.splits[split], store.read_all(split, OFFSETS)
        tokens = store.read(split, [0], info.tokens)[0]
        assert (info.documents, info.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
        assert offsets[0] == 0
        assert offsets[-1] == info.tokens
        assert np.array_equal(store.read_all(split, LENGTHS), np.diff(offsets))
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
    with raises(DataError, "tokens"):
        TokenStore.open(store_path).read("train", [0, start], length)


def test_many_shards_hold_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK", 16)
    monkeypatch.setattr(arrays, "SHARD", 64)
    rng = np.random.default_rng(0)
    lengths = np.array([1, 2, 63, 64, 65, 201, 6])
    tokens = [rng.integers(0, 100_000, length).astype(np.uint32) for length in lengths]
    masks = [rng.integers(0, 2, length).astype(np.uint8) for length in lengths]
    documents = ((np.array([len(own)]), np.array([7]), own, mask) for own, mask in zip(tokens, masks, strict=True))
    info, written = write_split(tmp_path / "train", np.dtype(np.uint32), documents, masked=True)
    assert np.array_equal(written, lengths)
    for name, expected in (("tokens", np.concatenate(tokens)), ("mask", np.concatenate(masks))):
        path = str(tmp_path / "train" / name)
        array = arrays.open_array(path)
        assert np.array_equal(arrays.read_ranges(array, path, [0], [info.tokens]), expected)
        assert len(list((tmp_path / "train" / name / "c").iterdir())) == -(-len(expected) // 64)
    assert (info.tokens, info.documents, info.bytes, info.longest) == (lengths.sum(), 7, 49, 201)


def test_the_type_leaves_a_value_that_is_no_token():
    assert token_dtype(2**16 - 1) == np.uint16
    assert token_dtype(2**16) == np.uint32


def test_a_missing_store_says_how_to_make_it(tmp_path):
    with raises(ConfigError, f"{tmp_path}/none: make data"):
        TokenStore.open(tmp_path / "none", hint="make data")


@pytest.mark.parametrize("name", [SHARD, "train/tokens/zarr.json", "validation/offsets/c/0", "tokenizer.json"])
def test_a_missing_or_short_file_is_named_at_the_start(copy, name):
    path = copy / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with raises(DataError, name):
        TokenStore.open(copy)
    path.unlink()
    with raises(DataError, name):
        TokenStore.open(copy)


def test_a_shard_that_vanishes_later_is_an_error_not_zeros(copy):
    store = TokenStore.open(copy)
    (copy / SHARD).unlink()
    with raises(DataError, SHARD):
        store.read("train", [0], 8)


def damages(path):
    return [damage.location for _, damage in TokenStore.open(path).verify() if damage is not None]


@pytest.mark.parametrize("place", range(20))
def test_a_flipped_bit_anywhere_in_a_shard_is_found_when_it_is_read_and_its_block_is_named(copy, place):
    rng = np.random.default_rng(place)
    path = copy / SHARD
    content = bytearray(path.read_bytes())
    at = int(rng.integers(len(content)))
    content[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    with raises(DataError, SHARD):
        use(copy)
    blocks = -(-TokenStore.open(copy).manifest.splits["train"].tokens // arrays.CHUNK)
    found = damages(copy)
    block, in_data = divmod(at, 2 * arrays.CHUNK + 4)
    assert found == [f"train/tokens block {block}"] or (block >= blocks and len(found) == blocks), (in_data, found)


def test_verify_finds_blocks_that_were_replaced_by_other_whole_ones(copy):
    path = copy / "train" / "tokens"
    store = TokenStore.open(copy)
    tokens = store.read("train", [0], store.manifest.splits["train"].tokens)[0].copy()
    tokens[arrays.CHUNK + 5] ^= 1
    shutil.rmtree(path)
    arrays.append(arrays.create(str(path), tokens.dtype), str(path), tokens)
    assert damages(copy) == ["train/tokens block 1"]


def test_verify_finds_damage_to_every_other_file(copy):
    manifest = TokenStore.open(copy).manifest
    for name, info in manifest.files.items():
        if info.digest is not None and name != "tokenizer.json":
            path = copy / name
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            assert any(each.startswith((name, name.removesuffix(".blocks/c/0"))) for each in damages(copy)), name
            path.write_bytes(content)
    assert not damages(copy)


def test_an_id_beyond_the_vocabulary_is_found(copy):
    manifest = TokenStore.open(copy).manifest
    smaller = replace(manifest, tokenizer=replace(manifest.tokenizer_info, vocab_size=200))
    (copy / "manifest.json").write_bytes(smaller.to_bytes())
    with raises(DataError, "vocabulary 200"):
        use(copy)
    store = TokenStore.open(copy)
    high = int(np.flatnonzero(store.read_ranges("train", "tokens", np.array([0]), np.array([2000])) >= 200)[0])
    with raises(DataError, f"vocabulary 200 {high} {high + 3};"):
        store.read_with_mask("train", np.array([0, high]), np.array([high, 3]))


def test_a_damaged_or_newer_manifest_is_refused(copy):
    path = copy / "manifest.json"
    tree = json.loads(path.read_text())
    for text, named in [
        (path.read_text()[:-40], "manifest"),
        ("[]", "manifest"),
        (json.dumps({key: value for key, value in tree.items() if key != "splits"}), "manifest"),
        (json.dumps(tree | {"format": 5}), "5, 4; update"),
        (json.dumps(tree | {"format": 3}), "3, 4; prepare"),
    ]:
        path.write_text(text)
        with raises(DataError, str(copy), named):
            TokenStore.open(copy)


@pytest.mark.parametrize(
    "change",
    [{"splits": {}}, {"kind": "sounds"}, {"kind": "images"}, {"block": 0}, {"index_block": 1}, {"masked": True}],
    ids=str,
)
def test_a_manifest_that_contradicts_itself_is_refused(copy, change):
    tree = json.loads((copy / "manifest.json").read_text()) | change
    del tree["digest"]
    (copy / "manifest.json").write_text(json.dumps(tree | {"digest": digest_of(tree)}))
    with raises(DataError, str(copy), "manifest"):
        TokenStore.open(copy)


def test_another_version_in_the_place_of_one_is_found(copy, tmp_path):
    named = TokenStore.open(copy).manifest.fingerprint
    other = tmp_path / "0123456789abcdef0123456789abcdef"
    shutil.copytree(copy, other)
    with raises(DataError, f"manifest.json: {named}, {other.name};"):
        TokenStore.open(other)
    with raises(ConfigError, f"data.version=cafe: {copy} {named}; use data.version=none"):
        TokenStore.open(copy, "cafe")
    assert TokenStore.open(copy, named[:6]).manifest.fingerprint == named


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
    with raises(StorageError, f"{tmp_path}/a: {status} No space left") as caught:
        arrays.create(str(tmp_path / "a"), np.dtype(np.uint16))
    assert "tensorstore_spec" not in str(caught.value)
