"""Images with labels, from a store of images."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, override

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED
from jaxinfra.config.limits import PositiveInt
from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.store.layout import IMAGES, LABELS
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import PREPARE, Store
from jaxinfra.data.store_data import StoreData, StoreDataset, StoreSamples
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImageData(StoreData):
    """Config of training on a store of images.

    Attributes:
        image_size: height and width in pixels, a multiple of the store's, to which images are enlarged by repetition.
        channels: number of channels.
        max_pixel: largest stored value; pixels are scaled from [0, max_pixel] to [-1, 1].
    """

    modality: ClassVar[str] = "image"
    image_size: PositiveInt
    channels: PositiveInt = 3
    max_pixel: PositiveInt = 255
    threads: Annotated[PositiveInt, NOT_FINGERPRINTED] = 1

    @override
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        images = ArraySpec(shape=(self.image_size, self.image_size, self.channels), axes=(None, None, None))
        weights = {"weights": ArraySpec()} if self.always_weighted(validation=validation) else {}
        return {"images": images, "labels": ArraySpec(dtype="int32")} | weights

    @override
    def open(self, *, hint: str = PREPARE) -> "ImageDataset":
        lenient = self.on_damage == "skip"
        store = Store.open(self.store, self.version, hint=hint, allow_missing_blocks=lenient, kind="images")
        height, width, channels = store.manifest.shape
        if height != width:
            raise ConfigError(
                f"data.store={self.store}: its images are {height} x {width}, expected squares; prepare square images"
            )
        if self.image_size % height:
            raise ConfigError(
                f"data.image_size={self.image_size}: expected a multiple of {height}, the size of the images of "
                f"{store}; use data.image_size={-(-self.image_size // height) * height}"
            )
        if self.channels != channels:
            raise ConfigError(
                f"data.channels={self.channels}: the images of {store} have {channels}; use data.channels={channels}"
            )
        return ImageDataset(store, self.seed, partial(ImageSamples, self, store))


class ImageSamples(StoreSamples[ImageData, Store]):
    """The images of a split with their labels."""

    def __init__(self, data: ImageData, store: Store, split: Split, limit: int | None = None):
        """Counts the images and reads their labels."""
        super().__init__(data, store, split, store.manifest.splits[split].documents, limit)
        self._labels = store.read_all(split, LABELS)[: len(self)]

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Returns `images`, float32[len(ids), height, width, channels] from -1 to 1, and `labels`, int32[len(ids)]."""
        with self._read_time.running():
            stored = self._store.read_ranges(self._split, IMAGES, ids, np.ones_like(ids))  # one image from each id on
        pixels = stored.astype(np.float32) * (2 / self._data.max_pixel) - 1
        scale = self._data.image_size // pixels.shape[1]
        batch = {"images": pixels.repeat(scale, axis=1).repeat(scale, axis=2), "labels": self._labels[ids]}
        return batch | {"weights": np.ones(len(ids), np.float32)} if weighted else batch

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return int(self._labels.max()) + 1


class ImageDataset(StoreDataset[Store, ImageSamples]):
    """An opened store of images."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields two lines for each training sample: shape and label, then pixel statistics cut to `chars`."""
        batch, names = self.train.read(ids, weighted=False), self.store.manifest.labels
        samples = zip(ids, batch["images"], batch["labels"], strict=True)
        for row, (sample, image, label) in enumerate(samples, first_row):
            name = f" ({names[label]})" if names else ""
            yield f"row {row}: image {sample}, {'x'.join(map(str, image.shape))}, label {label}{name}"
            yield f"mean {image.mean():.4f}, from {image.min():.4f} to {image.max():.4f}"[:chars]

    def check(self, model: object) -> None:
        """Raises ConfigError if the model has fewer classes than the store."""
        classes = max(self.train.num_classes, self.validation().num_classes, len(self.store.manifest.labels))
        model_classes = getattr(model, "num_classes", classes)  # users' own models may lack the field
        if model_classes < classes:
            raise ConfigError(
                f"model.num_classes={model_classes}: {self.store} has images of {classes} classes; "
                f"use model.num_classes={classes}"
            )
