"""Stores of images: what a record must be, and what is read back."""

import json

import numpy as np
import pytest

from jaxinfra.data.image_data import ImageData
from jaxinfra.data.image_set import ImageSet
from jaxinfra.data.making.prepare import prepare
from jaxinfra.data.records.jsonl import Jsonl
from jaxinfra.errors import DataError

IMAGE = [[1, 2], [3, 4]]


def recipe(folder, *more):
    """Sixty images of three classes, and what else is given."""
    records = [{"image": [[i, 2], [3, 255]], "label": i % 3} for i in range(60)]
    (folder / "source").mkdir()
    (folder / "source" / "images.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (*records, *more)))
    return ImageSet(store=str(folder / "store"), source=Jsonl(root=str(folder / "source")), heldout_fraction=0.3)


def test_every_image_is_read_once_an_epoch_with_its_label(tmp_path):
    made = prepare(recipe(tmp_path), workers=1)
    opened = ImageData(store=str(tmp_path / "store"), image_size=2, channels=1).open()
    count = len(opened.train)
    assert count == made.manifest.splits["train"].documents == 60 - len(opened.heldout())
    batch = opened.train.read(opened.ids(0, count), weighted=False)
    first = np.rint((batch["images"][:, 0, 0, 0] + 1) / 2 * 255).astype(int)
    assert len(set(first.tolist())) == count
    np.testing.assert_array_equal(batch["labels"], first % 3)


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        ({"image": IMAGE}, "no field label; it has image"),
        ({"image": [[1.5]], "label": 0}, r"image is float64\[1, 1, 1\], expected 0 to 255 .*"),
        ({"image": [[256]], "label": 0}, r"image is int64\[1, 1, 1\], expected 0 to 255 .*"),
        ({"image": [], "label": 0}, r"image is float64\[0\], expected 0 to 255 .*"),
        ({"image": [[1], [2, 3]], "label": 0}, "image or label is no whole number .*"),
        ({"image": IMAGE, "label": -1}, "label=-1: expected a whole number from 0 to 2147483647"),
        ({"image": IMAGE, "label": 2**31}, "label=2147483648: expected a whole number from 0 to 2147483647"),
        ({"image": IMAGE, "label": 1.5}, "image or label is no whole number .*"),
        ({"image": IMAGE, "label": float("inf")}, "image or label is no whole number .*"),
        ({"image": IMAGE, "label": None}, "image or label is no whole number .*"),
    ],
)
def test_what_is_no_image_is_a_bad_record(tmp_path, record, cause):
    with pytest.raises(DataError, match=rf"images\.jsonl:61: {cause}; mend the record"):
        prepare(recipe(tmp_path, record), workers=1)
