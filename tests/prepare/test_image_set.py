"""Images and labels become a store, each once; what is no image is named."""

import json
from dataclasses import replace

import numpy as np
import pytest

from jaxinfra.data.image_data import ImageData
from jaxinfra.data.store.store import IMAGES, LABELS, Store
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare.prepare import prepare
from jaxinfra.prepare.recipes.image_set import ImageSet
from jaxinfra.prepare.recipes.validation import ByKey
from jaxinfra.prepare.sources.jsonl import Jsonl

RECORDS = [{"image": [[number, 1, 2], [3, 4, 5]], "label": number % 3} for number in range(60)]
BAD = {
    "no label": ({"image": [[1]]}, r"no field label; it has image"),
    "a label that is a text": ({"image": [[1]], "label": "2"}, r"image or label is no whole number"),
    "a label between two": ({"image": [[1]], "label": 1.5}, r"image or label is no whole number"),
    "a label below 0": ({"image": [[1]], "label": -1}, r"label=-1: expected a whole number from 0 to 2"),
    "a label that is infinite": ({"image": [[1]], "label": float("inf")}, r"image or label is no whole number"),
    "no label at all": ({"image": [[1]], "label": None}, r"image or label is no whole number"),
    "a label of no class": ({"image": [[1]], "label": 3}, r"label=3: expected a whole number from 0 to 2"),
    "rows of two lengths": ({"image": [[1], [1, 2]], "label": 0}, r"image or label is no whole number"),
    "no rows": ({"image": [], "label": 0}, r"image is float64\[0\], expected 0 to 255"),
    "no pixels": ({"image": [[[]]], "label": 0}, r"image is float64\[1, 1, 0\], expected 0 to 255"),
    "shares of white": ({"image": [[0.5]], "label": 0}, r"image is float64\[1, 1, 1\], expected 0 to 255"),
    "brighter than white": ({"image": [[256]], "label": 0}, r"image is int64\[1, 1, 1\], expected 0 to 255"),
    "a row": ({"image": [1, 2], "label": 0}, r"image is int64\[2\], expected 0 to 255"),
}


@pytest.fixture
def write(tmp_path):
    def written(records) -> ImageSet:
        (tmp_path / "images.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        source = Jsonl(root=str(tmp_path), pattern="*.jsonl")
        classes = ("a", "b", "c")
        return ImageSet(store=str(tmp_path / "store"), source=source, classes=classes, validation=ByKey(fraction=0.3))

    return written


def test_every_image_is_in_one_split_with_its_label(write):
    recipe = write(RECORDS)
    store = Store.open(prepare(recipe, workers=1).path)
    assert store.manifest.shape == (2, 3, 1) and store.manifest.labels == recipe.classes
    images, labels = (
        np.concatenate([store.whole(split, name) for split in store.manifest.splits]) for name in (IMAGES, LABELS)
    )
    assert sorted(images[:, 0, 0, 0].tolist()) == list(range(60))
    assert all(image.tolist() == [[[image[0, 0, 0]], [1], [2]], [[3], [4], [5]]] for image in images)
    assert labels.tolist() == (images[:, 0, 0, 0] % 3).tolist()
    assert not any(damage for _, _, damage in store.verify())


def test_every_image_is_read_once_an_epoch_with_its_label(write):
    recipe = write(RECORDS)
    made = prepare(replace(recipe, classes=()), workers=1)
    opened = ImageData(store=recipe.store, image_size=6, channels=1)
    with pytest.raises(ConfigError, match="its images are 2 x 3, not square"):
        opened.open()
    square = write([{"image": [[number, 2], [3, 255]], "label": number % 3} for number in range(60)])
    assert prepare(square, workers=1).manifest.fingerprint != made.manifest.fingerprint
    opened = replace(opened, image_size=2).open()
    count = len(opened.train)
    assert count == 60 - len(opened.heldout())
    batch = opened.train.read(opened.ids(0, count), weighted=False)
    first = np.rint((batch["images"][:, 0, 0, 0] + 1) / 2 * 255).astype(int)
    assert len(set(first.tolist())) == count
    np.testing.assert_array_equal(batch["labels"], first % 3)


def test_labels_without_classes_fit_in_32_bits(write):
    recipe = replace(write([*RECORDS, {"image": [[1]], "label": 2**31}]), classes=())
    with pytest.raises(DataError, match="label=2147483648: expected a whole number from 0 to 2147483647"):
        prepare(recipe, workers=1)


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_image_is_named_or_left_out(write, case):
    bad, message = BAD[case]
    recipe = write([*RECORDS, bad])
    with pytest.raises(DataError, match=rf"^images\.jsonl(:61| at byte \d+): .*{message}"):
        prepare(recipe, workers=1)
    counts = prepare(replace(recipe, on_bad="skip"), workers=1).manifest.counts
    assert (counts.records, counts.skipped) == (61, 1)


def test_images_of_two_shapes_are_refused(write):
    with pytest.raises(DataError, match=r"images of 2 shapes \(1x1x1, 2x3x1\), all must have one; resize them first"):
        prepare(write([*RECORDS, {"image": [[1]], "label": 0}]), workers=1)
