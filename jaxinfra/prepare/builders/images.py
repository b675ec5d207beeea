"""Builds a store of images of one shape with labels: parses them in parallel, then writes them in order.

Shape suffixes: D images of a part, 2 halves of a 128-bit hash.
"""

import operator
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, override

import numpy as np

from jaxinfra.config import encode
from jaxinfra.data.store.layout import IMAGES, LABELS
from jaxinfra.data.store.manifest import SPLITS, Manifest, Split, SplitInfo
from jaxinfra.errors import DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders.job import PrepareJob, StoreBuilder, process_records
from jaxinfra.prepare.builders.select import select_documents
from jaxinfra.prepare.builders.writers import HashedArrayWriter, common_fields, write_array
from jaxinfra.prepare.documents.document import RecordError, get_field
from jaxinfra.prepare.documents.shingles import hash128
from jaxinfra.prepare.parts import PartMetadata, PartSplits
from jaxinfra.prepare.recipes.corpus import ImageSet
from jaxinfra.prepare.sources.record import Fields
from jaxinfra.storage.credentials import mask_tree

BLOCK_BYTES, SHARD_BLOCKS = 64 * 1024, 256
_MAX_BASELINE_IMAGES = 20_000  # of training; the baseline computes the distances of all pairs
type _Batches = Iterable[tuple[np.ndarray, ...]]  # images and labels of each part


def collect_images(folder: Path, job: PrepareJob[ImageSet]) -> PartMetadata:
    """Makes and commits the part of a job; raises as `tokenize_job`."""
    parse, skipped = partial(_parse_image, job.recipe), []
    rows_of: dict[Split, list[tuple[str, np.ndarray, int]]] = {split: [] for split in SPLITS}
    records = process_records(job.recipe, job.read_records(), parse, skipped, validation=job.validation)
    for split, location, (image, label) in records:
        rows_of[split].append((location, image, label))
    _require_one_shape({image.shape for rows in rows_of.values() for _, image, _ in rows}, job.shards[0].name)
    splits: dict[Split, parts.Arrays] = {
        split: {
            "images": np.array([image for _, image, _ in rows], np.uint8),
            "labels": np.array([label for _, _, label in rows], np.int32),
            "digest_D2": np.array([hash128(image.tobytes()) for _, image, _ in rows], np.uint64).reshape(-1, 2),
            "where_D": np.array([location for location, _, _ in rows], np.str_),
        }
        for split, rows in rows_of.items()
    }
    count = len(skipped) + sum(map(len, rows_of.values()))
    metadata = PartMetadata(records=count, read_bytes=job.read_bytes, skipped=tuple(skipped))
    return parts.write_part(folder, job.number, metadata, splits)


def _parse_image(recipe: ImageSet, record: Fields) -> tuple[np.ndarray, int]:
    """Returns the image, uint8[height, width, channels], and the label of a record."""
    number: Any = get_field(record, recipe.label)
    try:
        image, label = np.asarray(get_field(record, recipe.image)), operator.index(number)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{recipe.image} or {recipe.label} is not a whole number ({error})") from None
    if image.ndim == 2:
        image = image[:, :, None]
    is_integer_image = image.ndim == 3 and image.size and np.issubdtype(image.dtype, np.integer)
    if not is_integer_image or image.min() < 0 or image.max() > 255:
        actual = f"{image.dtype}{list(image.shape)}"
        raise RecordError(f"{recipe.image} is {actual}, expected [height, width, channels] of values from 0 to 255")
    last = len(recipe.classes) - 1 if recipe.classes else int(np.iinfo(np.int32).max)
    if not 0 <= label <= last:
        raise RecordError(f"{recipe.label}={label}: must be a whole number from 0 to {last}")
    return image.astype(np.uint8), label


def _require_one_shape(shapes: set[tuple[int, ...]], location: str) -> tuple[int, ...]:
    """Returns the shape of all images, () without images; DataError for several shapes."""
    if len(shapes) > 1:
        some = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:3])
        raise DataError(f"{location}: has images of {len(shapes)} shapes ({some}), all must have one; resize them")
    return next(iter(shapes), ())


class ImageStoreBuilder(StoreBuilder[ImageSet]):
    """Builds a store of images."""

    stage = "images"
    input_digest = None

    def __init__(self, recipe: ImageSet):
        self._recipe = recipe
        self.make_part = collect_images

    @override
    def estimate_bytes(self, source_bytes: int) -> int:
        return 2 * source_bytes

    @override
    def assemble(self, folder: Path, num_parts: int, build: Path, source_digest: str) -> Manifest:
        source, names = PartSplits(folder=folder, num_parts=num_parts), ("images", "labels")
        keep, counts = select_documents(self._recipe, source, build)
        images_of_parts = (images for split in SPLITS for (images,) in source.read_kept(split, keep, "images"))
        shape = _require_one_shape({images.shape[1:] for images in images_of_parts if len(images)}, self._recipe.store)
        image_bytes = int(np.prod(shape))
        block = max(1, BLOCK_BYTES // max(1, image_bytes))
        splits: dict[Split, SplitInfo] = {}
        for split in SPLITS:
            path = build / split / IMAGES
            writer = HashedArrayWriter(path, np.dtype(np.uint8), shape=shape, block=block, shard=SHARD_BLOCKS * block)
            label_parts = []
            for images, labels in source.read_kept(split, keep, *names):
                writer.add(images.reshape(-1, *shape))
                label_parts.append(labels)
            labels = np.concatenate(label_parts)
            writer.close()
            write_array(build / split / LABELS, labels)
            num_bytes = len(labels) * image_bytes
            splits[split] = SplitInfo(documents=len(labels), tokens=0, bytes=num_bytes, longest=0)
        baselines = {}
        if self._recipe.baselines and splits["train"].documents <= _MAX_BASELINE_IMAGES:
            train, validation = (source.read_kept(split, keep, *names) for split in ("train", "validation"))
            baselines = nearest_neighbor_accuracy(train, validation)
        return Manifest(
            kind="images",
            recipe=mask_tree(encode(self._recipe)),
            source_digest=source_digest,
            counts=counts,
            dtype="uint8",
            shape=shape,
            block=block,
            labels=self._recipe.classes,
            splits=splits,
            baselines=baselines,
            **common_fields(build),
        )


def nearest_neighbor_accuracy(train: _Batches, validation: _Batches) -> dict[str, dict[str, float]]:
    """Classifies each validation image as its nearest training image, by squared pixel distance."""
    train_pixels, train_labels = _concatenate(train)
    pixels, labels = _concatenate(validation)
    # |t - v|^2 = t^2 - 2 t v + v^2, without v^2, which does not change the order of the training images.
    distance = (train_pixels**2).sum(-1) - 2 * pixels @ train_pixels.T
    predicted = train_labels[distance.argmin(axis=1)]
    return {"accuracy": {"nearest neighbor": float((predicted == labels).mean())}}


def _concatenate(batches: _Batches) -> tuple[np.ndarray, np.ndarray]:
    """Returns all images, float32[images, pixels], and labels, int32[images]."""
    images, labels = zip(*(batch for batch in batches if len(batch[0])), strict=True)
    images = np.concatenate(images)
    return images.reshape(len(images), -1).astype(np.float32), np.concatenate(labels)
