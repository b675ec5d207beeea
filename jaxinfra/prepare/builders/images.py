"""Making a store of images: arrays of one shape and their labels, checked in parallel, then written in order."""

import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfra.config import encode
from jaxinfra.data.store.manifest import SPLITS, Manifest, Split, SplitInfo
from jaxinfra.data.store.store import IMAGES, LABELS, hash_files
from jaxinfra.errors import DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders import assemble
from jaxinfra.prepare.builders.assemble import Blocks, Splits, write_array
from jaxinfra.prepare.builders.job import Job
from jaxinfra.prepare.documents.document import RecordError, value_of
from jaxinfra.prepare.documents.shingles import digest_of_bytes
from jaxinfra.prepare.parts import Note, Part
from jaxinfra.prepare.recipes.image_set import ImageSet
from jaxinfra.prepare.sources.record import Piece, Record

BLOCK_BYTES, SHARD_BLOCKS = 64 * 1024, 256
_LARGEST_BASELINE = 20_000
"""Training images; the distances of all pairs are computed."""


def collect(job: Job[ImageSet]) -> Note:
    """Makes and commits the part of a job; raises as `tokenise` does of text."""
    recipe, skipped = job.recipe, []
    found: dict[Split, list[tuple[str, np.ndarray, int]]] = {split: [] for split in SPLITS}
    for split, where, (image, label) in job.made(partial(_pair, recipe), skipped):
        found[split].append((where, image, label))
    _one_shape({image.shape for rows in found.values() for _, image, _ in rows}, job.pieces[0].name)
    splits: dict[Split, dict[str, np.ndarray]] = {
        split: {
            "images": np.array([image for _, image, _ in rows], np.uint8),
            "labels": np.array([label for _, _, label in rows], np.int32),
            "digest_D2": np.array([digest_of_bytes(image.tobytes()) for _, image, _ in rows], np.uint64).reshape(-1, 2),
            "where_D": np.array([where for where, _, _ in rows], np.str_),
        }
        for split, rows in found.items()
    }
    count = len(skipped) + sum(map(len, found.values()))
    part = Part(splits=splits, records=count, read_bytes=job.read_bytes, skipped=tuple(skipped))
    return parts.write(Path(job.folder), job.number, part)


def _pair(recipe: ImageSet, record: Record) -> tuple[np.ndarray, int]:
    """The image `[height, width, channels]` and the label of a record."""
    pixels, number = value_of(record, recipe.image), value_of(record, recipe.label)
    try:
        image, label = np.asarray(pixels), operator.index(number)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{recipe.image} or {recipe.label} is no whole number ({error})") from None
    if image.ndim == 2:
        image = image[:, :, None]
    whole = image.ndim == 3 and image.size and np.issubdtype(image.dtype, np.integer)
    if not whole or image.min() < 0 or image.max() > 255:
        found = f"{image.dtype}{list(image.shape)}"
        raise RecordError(f"{recipe.image} is {found}, expected 0 to 255 [height, width, channels]")
    last = len(recipe.classes) - 1 if recipe.classes else int(np.iinfo(np.int32).max)
    if not 0 <= label <= last:
        raise RecordError(f"{recipe.label}={label}: expected a whole number from 0 to {last}")
    return image.astype(np.uint8), label


def _one_shape(shapes: set[tuple[int, ...]], where: str) -> tuple[int, ...]:
    """Returns the shape of all images, () where there are none; refuses several."""
    if len(shapes) > 1:
        some = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:3])
        raise DataError(f"{where}: images of {len(shapes)} shapes ({some}), all must have one; resize them first")
    return next(iter(shapes), ())


class ImageMaker:
    """What preparing images has of its own."""

    stage = "images"
    job = staticmethod(collect)
    identity = None

    def __init__(self, images: ImageSet):
        self._images = images

    def begin(self, folder: Path, pieces: Sequence[Piece]) -> None:
        """Nothing is needed."""

    def needed_bytes(self, source_bytes: int) -> int:
        """Parts and arrays exist at once."""
        return 2 * source_bytes

    def assemble(self, folder: Path, numbers: Sequence[int], build: Path, source_digest: str) -> Manifest:
        """Makes all files of the version but the manifest; raises as `TextMaker.assemble`."""
        source, names = Splits(folder=folder, numbers=numbers), ("images", "labels")
        keep, counts = assemble.kept(self._images, source, build)
        shapes = {images.shape[1:] for split in SPLITS for images, _ in source.kept(split, keep, *names) if len(images)}
        shape = _one_shape(shapes, self._images.store)
        block = max(1, BLOCK_BYTES // max(1, int(np.prod(shape))))
        splits: dict[Split, SplitInfo] = {}
        for split in SPLITS:
            path, shard = build / split / IMAGES, SHARD_BLOCKS * block
            writer, every, n_bytes = Blocks(path, np.dtype(np.uint8), shape=shape, block=block, shard=shard), [], 0
            for images, labels in source.kept(split, keep, *names):
                writer.add(images.reshape(-1, *shape))
                every.append(labels)
                n_bytes += images.nbytes
            labels = np.concatenate(every)
            digests = writer.close() + write_array(build / split / LABELS, labels)
            digest = xxhash.xxh3_128_hexdigest(digests.encode())
            splits[split] = SplitInfo(documents=len(labels), tokens=0, bytes=n_bytes, longest=0, digest=digest)
        measured = self._images.baselines and splits["train"].documents <= _LARGEST_BASELINE
        both = (list(source.kept(split, keep, *names)) for split in SPLITS)
        return Manifest(
            kind="images",
            recipe=encode(self._images),
            source_digest=source_digest,
            counts=counts,
            dtype="uint8",
            shape=shape,
            block=block,
            tokenizer=None,
            labels=self._images.classes,
            splits=splits,
            files=hash_files(build, unhashed=(IMAGES,)),
            baselines=nearest(*both) if measured else {},
            **assemble.made_now(),
        )


def nearest(train: Sequence[Any], validation: Sequence[Any]) -> dict[str, dict[str, float]]:
    """How often the nearest training image, by squared distance of pixels, is of the class of a validation one."""
    pixels, labels = [], []
    for split in (train, validation):
        images = np.concatenate([images for images, _ in split if len(images)])
        pixels.append(images.reshape(len(images), -1).astype(np.float32))
        labels.append(np.concatenate([labels for _, labels in split]))
    distance = (pixels[0] ** 2).sum(-1) - 2 * pixels[1] @ pixels[0].T
    found = labels[0][distance.argmin(axis=1)]
    return {"accuracy": {"nearest neighbor": float((found == labels[1]).mean())}}
