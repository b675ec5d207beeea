"""Making a store of images: arrays of one shape and their labels, checked in parallel, then written in order."""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from jaxinfra.config import encode
from jaxinfra.data.store.manifest import SPLITS, Manifest, Split, SplitInfo
from jaxinfra.data.store.store import IMAGES, LABELS, hash_files
from jaxinfra.errors import ConfigError, DataError
from jaxinfra.prepare import parts
from jaxinfra.prepare.builders import assemble
from jaxinfra.prepare.builders.assemble import Blocks, write_array
from jaxinfra.prepare.builders.bad_records import BadRecords
from jaxinfra.prepare.documents.document import RecordError, value_of
from jaxinfra.prepare.parts import Note, Open, Part
from jaxinfra.prepare.recipes.corpus import draw
from jaxinfra.prepare.recipes.image_set import ImageSet
from jaxinfra.prepare.sources.record import Bad, Piece, Record

BLOCK_BYTES, SHARD_BLOCKS = 64 * 1024, 256
_LARGEST_BASELINE = 20_000
"""Training images; the distances of all pairs are computed."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one worker does at a time.

    Attributes:
        number: of the part that it makes.
        pieces: what it reads.
        images: the recipe.
        folder: for parts.
    """

    number: int
    pieces: tuple[Piece, ...]
    images: ImageSet
    folder: str


def collect(job: Job) -> Note:
    """Makes and commits the part of a job.

    Raises:
        DataError: a record cannot be used and the recipe does not skip it; nothing is committed.
        StorageError: the source cannot be read.
        OSError: the part cannot be written.
    """
    images: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
    labels: dict[Split, list[int]] = {split: [] for split in SPLITS}
    bad, records = BadRecords(job.images.on_bad), 0
    for piece in job.pieces:
        for each in job.images.source.read(piece):
            records += 1
            if isinstance(each, Bad):
                bad.add(each.where, each.cause)
                continue
            try:
                image, label = _pair(job.images, each.record)
            except RecordError as error:
                bad.add(each.where, str(error))
                continue
            split: Split = "heldout" if draw(each.key) < job.images.heldout_fraction else "train"
            images[split].append(image)
            labels[split].append(label)
    _require_one_shape([image for split in SPLITS for image in images[split]], job.pieces[0].name)
    splits: dict[Split, dict[str, np.ndarray]] = {
        split: {"images": np.array(images[split], np.uint8), "labels": np.array(labels[split], np.int32)}
        for split in SPLITS
    }
    part = Part(
        splits=splits,
        records=records,
        read_bytes=sum(piece.size_bytes for piece in job.pieces),
        skipped=tuple(bad.found),
    )
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
        raise RecordError(
            f"{recipe.image} is {image.dtype}{list(image.shape)}, expected 0 to 255 [height, width, channels]"
        )
    last = len(recipe.classes) - 1 if recipe.classes else int(np.iinfo(np.int32).max)
    if not 0 <= label <= last:
        raise RecordError(f"{recipe.label}={label}: expected a whole number from 0 to {last}")
    return image.astype(np.uint8), label


def _require_one_shape(images: Sequence[np.ndarray], where: str) -> None:
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise _shapes_differ(shapes, where)


def _shapes_differ(shapes: set[tuple[int, ...]], where: str) -> DataError:
    some = ", ".join("x".join(map(str, shape)) for shape in sorted(shapes)[:3])
    return DataError(f"{where}: images of {len(shapes)} shapes ({some}), all must have one; resize them first")


class ImageMaker:
    """What preparing images has of its own: `prepare.Maker`."""

    stage = "images"
    identity = None

    def __init__(self, images: ImageSet):
        self._images = images

    @property
    def job(self) -> Callable[[Job], Note]:
        """See `prepare.Maker`."""
        return collect

    def begin(self, folder: Path, pieces: Sequence[Piece]) -> None:
        """Nothing is needed."""

    def needed_bytes(self, source_bytes: int) -> int:
        """Parts and arrays exist at once."""
        return 2 * source_bytes

    def jobs(self, folder: Path, groups: Mapping[int, tuple[Piece, ...]]) -> list[Job]:
        """What to read."""
        return [
            Job(number=number, pieces=group, images=self._images, folder=str(folder))
            for number, group in groups.items()
        ]

    def assemble(self, folder: Path, numbers: Sequence[int], build: Path, source_digest: str) -> Manifest:
        """Makes all files of the version but the manifest; see `prepare.Maker`."""
        counts = assemble.counts(folder, numbers, build)
        shape = self._shape(folder, numbers)
        block = max(1, BLOCK_BYTES // max(1, int(np.prod(shape))))
        splits: dict[Split, SplitInfo] = {
            split: self._write(folder, numbers, build, split, shape, block) for split in SPLITS
        }
        found: dict[Split, int] = {split: info.documents for split, info in splits.items()}
        assemble.check_splits(self._images.store, found, counts, self._images.heldout_fraction)
        manifest = Manifest(
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
            baselines={},
            **assemble.made_now(),
        )
        if self._images.baselines and found["train"] <= _LARGEST_BASELINE:
            manifest = replace(manifest, baselines=nearest(*(list(_read(folder, numbers, split)) for split in SPLITS)))
        return manifest

    def _shape(self, folder: Path, numbers: Sequence[int]) -> tuple[int, ...]:
        shapes = {images.shape[1:] for split in SPLITS for images, _ in _read(folder, numbers, split) if len(images)}
        if len(shapes) > 1:
            raise _shapes_differ(shapes, self._images.store)
        if not shapes:
            raise ConfigError(f"store={self._images.store}: the source has no image; mend the source")
        return shapes.pop()

    def _write(
        self, folder: Path, numbers: Sequence[int], build: Path, split: Split, shape: tuple[int, ...], block: int
    ) -> SplitInfo:
        writer = Blocks(
            build / split / IMAGES, np.dtype(np.uint8), shape=shape, block=block, shard=SHARD_BLOCKS * block
        )
        every, n_bytes = [np.empty(0, np.int32)], 0
        for images, labels in _read(folder, numbers, split):
            writer.add(images.reshape(-1, *shape))
            every.append(labels)
            n_bytes += images.nbytes
        digest, labels = writer.close(), np.concatenate(every)
        write_array(build / split / LABELS, labels)
        seen = digest + xxhash.xxh3_128_hexdigest(labels.astype("<i4").tobytes())
        return SplitInfo(
            documents=len(labels), tokens=0, bytes=n_bytes, longest=0, digest=xxhash.xxh3_128_hexdigest(seen.encode())
        )


def _read(folder: Path, numbers: Sequence[int], split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of each part."""
    for number in numbers:
        with Open(folder, number) as part:
            yield part.read(split, "images"), part.read(split, "labels")


def nearest(train: Sequence[Any], heldout: Sequence[Any]) -> dict[str, dict[str, float]]:
    """How often the nearest training image, by squared distance of pixels, is of the class of a held-out one."""
    pixels, labels = [], []
    for split in (train, heldout):
        images = np.concatenate([images for images, _ in split if len(images)])
        pixels.append(images.reshape(len(images), -1).astype(np.float32))
        labels.append(np.concatenate([labels for _, labels in split]))
    distance = (pixels[0] ** 2).sum(-1) - 2 * pixels[1] @ pixels[0].T
    found = labels[0][distance.argmin(axis=1)]
    return {"accuracy": {"nearest neighbour": float((found == labels[1]).mean())}}
