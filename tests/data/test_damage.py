"""Stores of every kind are damaged at random; nothing that is read from them differs without an error."""

import dataclasses
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.image_data import ImageData
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.pairs import PairData
from jaxinfra.data.store import arrays
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.builders import images
from jaxinfra.prepare.documents.formats import Preference
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.corpus import ImageSet
from jaxinfra.prepare.recipes.validation import ByKey
from tests.refusals import names, raises
from tests.stores import bytes_recipe, jsonl

T = 16
SMALL = {"CHUNK": 64, "SHARD": 256, "SMALL_CHUNK": 8, "SMALL_SHARD": 32}
VALIDATION = ByKey(fraction=0.2)


@pytest.fixture(scope="module")
def small_blocks():
    """Stores that are prepared while this holds have many blocks and files."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(arrays, name, value)
        patch.setattr(images, "BLOCK_BYTES", 24)
        patch.setattr(images, "SHARD_BLOCKS", 2)
        yield


def texts(folder: Path, seed: int) -> DataConfig:
    words = random.Random(seed).choices("abcdefgh", k=4000)
    source = jsonl(folder / "text", ["".join(words[at : at + 40]) for at in range(0, 4000, 40)])
    recipe = bytes_recipe(source.root, folder / "store", packs=(PackSpec(seq_len=T),), validation=VALIDATION)
    return TokenData(store=prepare(recipe, workers=1).path, seq_len=T)


def pairs(folder: Path, seed: int) -> DataConfig:
    draw = random.Random(seed)
    records = [
        {"prompt": "p" * 5, "chosen": draw.choice("abc") * 9, "rejected": draw.choice("xyz") * 7} for _ in range(60)
    ]
    fields = {"format": Preference(template=None), "validation": VALIDATION}
    recipe = bytes_recipe(jsonl(folder / "pairs", records).root, folder / "store", **fields)
    return PairData(store=prepare(recipe, workers=1).path, seq_len=T)


def pictures(folder: Path, seed: int) -> DataConfig:
    draw = random.Random(seed)
    records = [
        {"image": [[draw.randrange(256) for _ in range(2)] for _ in range(2)], "label": draw.randrange(3)}
        for _ in range(90)
    ]
    source = jsonl(folder / "images", records)
    recipe = ImageSet(store=str(folder / "store"), source=source, classes=("a", "b", "c"), validation=VALIDATION)
    return ImageData(store=prepare(recipe, workers=1).path, image_size=2, channels=1)


def packed(folder: Path, seed: int) -> DataConfig:
    data = texts(folder, seed)
    return TokenData(store=data.store, seq_len=T, packing="best_fit")


KINDS = {"texts": texts, "packed": packed, "pairs": pairs, "images": pictures}


def flip(path: Path, other: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, other: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def zero(path: Path, other: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    end = draw.randrange(start, len(content)) + 1
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def delete(path: Path, other: Path, draw: random.Random) -> None:
    path.unlink()


def swap(path: Path, other: Path, draw: random.Random) -> None:
    """With a file of the same array, or else of any."""
    beside = [each for each in path.parent.iterdir() if each != path and each.is_file()]
    root = next(each for each in path.parents if len(each.name) == 32)
    second = draw.choice(beside or [each for each in root.rglob("*") if each.is_file() and each != path])
    content = path.read_bytes()
    path.write_bytes(second.read_bytes())
    second.write_bytes(content)


def replace(path: Path, other: Path, draw: random.Random) -> None:
    """By the file of another store, which is whole by itself."""
    shutil.copyfile(other, path)


def replace_folder(path: Path, other: Path, draw: random.Random) -> None:
    """The same with all that is in its folder, such as an array with its description."""
    for each in other.parent.rglob("*"):
        if each.is_file():
            shutil.copyfile(each, path.parent / each.relative_to(other.parent))


def exchange_chunks(path: Path, other: Path, draw: random.Random) -> None:
    """Two equally long parts of a file."""
    content = bytearray(path.read_bytes())
    size = draw.randrange(1, len(content) // 2 + 1)
    first = draw.randrange(len(content) - 2 * size + 1)
    second = draw.randrange(first + size, len(content) - size + 1)
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )
    path.write_bytes(content)


DAMAGES = [flip, truncate, zero, delete, swap, replace, replace_folder, exchange_chunks]


def read_everything(data: DataConfig) -> list[np.ndarray]:
    """What training and evaluation read."""
    opened = data.open(hint="")
    found = []
    for samples in (opened.train, opened.validation()):
        batch = samples.read(np.arange(len(samples)), weighted=True)
        found += [np.asarray(len(samples)), *(batch[name].copy() for name in sorted(batch))]
    return found


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))


@pytest.fixture(params=KINDS)
def two(request, small_blocks, tmp_path):
    """Two stores of one kind with the same shape and other contents."""
    folders = [tmp_path / name for name in ("whole", "other")]
    for folder in folders:
        folder.mkdir()
    return [KINDS[request.param](folder, seed) for seed, folder in enumerate(folders)]


def test_no_damage_is_read_without_an_error(two):
    data, other = two
    root, expected = Path(data.store), read_everything(data)
    contents = {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}
    draw, outcomes = random.Random(0), Counter()
    for number in range(64):
        damage, path = DAMAGES[number % len(DAMAGES)], draw.choice([*contents])
        damage(path, Path(other.store) / path.relative_to(root), draw)
        try:
            outcomes["same" if same(read_everything(data), expected) else f"{damage.__name__} of {path}"] += 1
        except (ConfigError, DataError) as error:
            outcomes["found"] += 1
            assert "\n" not in str(error)
        for each, content in contents.items():
            if not each.exists() or each.read_bytes() != content:
                each.write_bytes(content)
    assert outcomes.keys() <= {"same", "found"} and outcomes["found"] > 32


def training_batches(data, rows=slice(None)):
    opened = data.open(hint="")
    options = {"global_batch": 12, "rows": rows, "start_step": 0, "steps": 8, "sample_ids": opened.sample_ids}
    loader = BatchLoader(data, opened.train, **options)
    return [batch for _, batch in loader], loader.take_skipped(8)


def test_damaged_samples_are_left_out_the_same_way_by_any_number_of_processes(two, caplog):
    data, other = two
    skipping = dataclasses.replace(data, on_damage="skip")
    whole, none = training_batches(skipping)
    assert none == {} and not caplog.records
    array = "images" if isinstance(data, ImageData) else "tokens"
    name = sorted(path.name for path in Path(data.store, "train", array, "c").iterdir())[-1]
    file = Path(data.store, "train", array, "c", name, *["0"] * 3 * (array == "images"))
    shutil.copyfile(Path(other.store) / file.relative_to(data.store), file)
    found, skipped = training_batches(skipping)
    assert skipped
    ids_of = data.open(hint="").sample_ids
    for step, (before, after) in enumerate(zip(whole, found, strict=True)):
        lost_B = np.isin(ids_of(step, 12), skipped.get(step, []))
        assert before.keys() == after.keys()
        for field in before:
            np.testing.assert_array_equal(after[field][~lost_B], before[field][~lost_B])
            assert not after[field][lost_B].any() and after[field].dtype == before[field].dtype
    assert len([line for line in caplog.messages if str(file) in line]) == len(skipped)
    parts = [training_batches(skipping, rows) for rows in np.array_split(np.arange(12), 5)]
    for step, expected in enumerate(found):
        for field in expected:
            joined = np.concatenate([batches[step][field] for batches, _ in parts])
            np.testing.assert_array_equal(joined, expected[field])
        each = [sample for _, own in parts for sample in own.get(step, [])]
        assert sorted(set(each)) == sorted(skipped.get(step, []))
    with pytest.raises(DataError) as stopped:
        training_batches(data)
    line = names(str(stopped.value), f"training {file}: block expected data.on_damage=skip")
    assert any(f" {sample}" in line for samples in skipped.values() for sample in samples)


def test_too_many_damaged_samples_are_an_error(small_blocks, tmp_path):
    data = dataclasses.replace(texts(tmp_path, 0), on_damage="skip")
    shutil.rmtree(Path(data.store) / "train/tokens/c")
    with raises(DataError, "train/tokens/c/ missing damaged 16"):
        training_batches(data)


def test_a_block_that_is_damaged_only_once_is_read_again(small_blocks, tmp_path, monkeypatch, caplog):
    data = texts(tmp_path, 0)
    expected, _ = training_batches(data)
    read, left = arrays.read_ranges, [1]

    def stale_once(*arguments):
        values = read(*arguments)
        if left:
            left.pop()
            values[0] ^= 1
        return values

    monkeypatch.setattr(arrays, "read_ranges", stale_once)
    found, _ = training_batches(data)
    assert all(np.array_equal(one["inputs"], two["inputs"]) for one, two in zip(expected, found, strict=True))
    (line,) = caplog.messages
    names(line, "train/tokens: first block")
