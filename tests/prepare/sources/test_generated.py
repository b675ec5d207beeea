"""Sources of functions, synthetic documents and images."""

import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from jaxinfra.errors import ConfigError, DataError, StorageError
from jaxinfra.prepare.sources.generated import PythonSource, Synthetic
from jaxinfra.prepare.sources.image_folders import ImageFolders
from tests.prepare.sources.reading import assert_shards_do_not_matter, bad, found, read_all, shards_of
from tests.refusals import names, raises

MODULE = """
def plain():
    yield "one"
    yield {"text": "two", "n": 2}

def sharded(shard, shards):
    yield from (str(number) for number in range(shard, 10, shards))

sharded.version = "7"

def broken():
    yield "one"
    raise KeyError("two")

def odd():
    yield from ["one", 2]
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "own_records.py").write_text(MODULE)
    (tmp_path / "own_broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_records"
    sys.modules.pop("own_records", None)


def test_a_function_yields_records(module):
    one, two = assert_shards_do_not_matter(PythonSource(factory=f"{module}:plain"), [1, 100])
    assert one.fields == {"text": "one"}
    assert two.fields == {"text": "two", "n": 2}
    assert two.key == "own_records:plain/0#1"


def test_a_function_yields_its_shards(module):
    source = PythonSource(factory=f"{module}:sharded", num_shards=3)
    records = assert_shards_do_not_matter(source, [1], most=3)
    assert [each.fields["text"] for each in records] == [*"0369", *"147", *"258"]
    assert {shard.stamp for shard in shards_of(source)} == {"3:7"}


def test_errors_of_a_function_name_it_and_the_record(module):
    with raises(DataError, "own_records:broken/0: 1 KeyError 'two'") as error:
        read_all(PythonSource(factory=f"{module}:broken"))
    assert isinstance(error.value.__cause__, KeyError)
    (line,) = bad(PythonSource(factory=f"{module}:odd"))
    names(line, "own_records:odd/0 record 1: int")


@pytest.mark.parametrize(
    "factory, cause",
    [
        ("own_records:none", "none"),
        ("own_nothing:f", "ModuleNotFoundError: own_nothing"),
        ("own_broken:f", "ZeroDivisionError:"),
    ],
)
def test_a_missing_function_is_named(module, factory, cause):
    with raises(ConfigError, f"factory={factory}: {cause}"):
        shards_of(PythonSource(factory=factory))


def test_synthetic_documents_depend_on_seed_and_number_only():
    source = Synthetic(num_documents=50, mean_words=20, vocab_size=100)
    records = assert_shards_do_not_matter(source, [100, 1000], most=50)
    assert len({each.fields["text"] for each in records}) == 50
    more = found(Synthetic(num_documents=60, mean_words=20, vocab_size=100))
    assert more[:50] == records
    assert found(Synthetic(num_documents=50, mean_words=20, vocab_size=100, seed=1)) != records


@pytest.mark.parametrize("vocabulary", [2, 70, 71, 5000])
def test_synthetic_documents_have_the_requested_statistics(vocabulary):
    records = found(Synthetic(num_documents=400, mean_words=100, vocab_size=vocabulary))
    words = [each.fields["text"].replace(".", "").split() for each in records]
    lengths = [len(document) for document in words]
    assert (min(lengths) >= 50, max(lengths) <= 150) == (True, True)
    assert np.mean(lengths) == pytest.approx(100, rel=0.05)
    kinds = {word for document in words for word in document}
    assert len(kinds) <= vocabulary
    assert len(kinds) > 0.9 * min(vocabulary, 1000)
    followers = defaultdict(Counter)
    for document in words:
        for left, right in zip(document, document[1:], strict=False):
            followers[left][right] += 1
    likely = sum(sum(count for _, count in each.most_common(3)) for each in followers.values())
    assert likely / sum(each.total() for each in followers.values()) > 0.85


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    pixels = {}
    for name in ("dog/1.png", "cat/b/2.PNG", "cat/1.png", "cat-like/1.png"):
        pixels[name] = rng.integers(0, 256, (5, 7, 3), np.uint8)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[name]).save(tmp_path / name)
    (tmp_path / "cat" / "README").write_text("no image")
    Image.fromarray(pixels["dog/1.png"]).save(tmp_path / "no_class.png")
    return tmp_path, pixels


def test_images_are_labeled_by_folder(images):
    root, pixels = images
    source = ImageFolders(root=str(root))
    records = found(source, 1)
    assert [(each.key, each.fields["label"], each.fields["class"]) for each in records] == [
        ("cat/1.png", 0, "cat"),
        ("cat/b/2.PNG", 0, "cat"),
        ("cat-like/1.png", 1, "cat-like"),
        ("dog/1.png", 2, "dog"),
    ]
    assert len(shards_of(source, 1)) == 4
    assert len(shards_of(source)) == 3
    for pattern in ("*/**/*", "**/*"):
        for each, again in zip(records, found(ImageFolders(root=str(root), pattern=pattern)), strict=True):
            assert np.array_equal(each.fields["image"], pixels[each.key])
            assert np.array_equal(each.fields["image"], again.fields["image"])
    grey = found(ImageFolders(root=str(root), pattern="dog/*", mode="L"))
    assert [(each.fields["image"].shape, each.fields["label"]) for each in grey] == [((5, 7, 1), 2)]


def test_images_that_are_rotated_damaged_or_16_bit(tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.zeros((2, 3, 3), np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "a" / "1.jpg", exif=exif)
    (tmp_path / "a" / "2.png").write_bytes((tmp_path / "a" / "1.jpg").read_bytes()[:100])
    (tmp_path / "a" / "3.png").write_bytes(b"nothing")
    Image.fromarray(np.full((2, 2), 3000, np.uint16)).save(tmp_path / "a" / "4.png")
    source = ImageFolders(root=str(tmp_path))
    assert read_all(source)[0].fields["image"].shape == (3, 2, 3)
    names = ["a/2.png", "a/3.png", "a/4.png"]
    assert [line.partition(":")[0] for line in bad(source)] == names
    assert "more than 8 bits" in bad(source)[-1]


def test_images_that_change_after_listing_are_refused(images):
    root, _ = images
    source = ImageFolders(root=str(root))
    shards = shards_of(source)
    (root / "cat" / "1.png").unlink()
    with raises(StorageError, "/cat: changed"):
        list(source.read(shards[0]))
