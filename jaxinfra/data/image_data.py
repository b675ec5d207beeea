"""Training on images: samples of a store of images with labels (see `batches`)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Protocol

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED
from jaxinfra.config.limits import Count
from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import IMAGES, LABELS, PREPARE, Store
from jaxinfra.data.store_data import StoreData, StoreDataset, StoreSamples
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImageData(StoreData):
    """Training on a store of images.

    Attributes:
        image_size: pixels of a side, a multiple of those of the store: every pixel becomes a square.
        channels: of a pixel.
        white: the value of a pixel that becomes 1; 0 becomes -1.
    """

    modality: ClassVar[str] = "image"
    image_size: Count
    channels: Count = 3
    white: Count = 255
    threads: Annotated[Count, NOT_FINGERPRINTED] = 1

    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns images `[H, W, channels]` and labels; validation batches have weights."""
        images = ArraySpec(shape=(self.image_size, self.image_size, self.channels), axes=(None, None, None))
        weights = {"weights": ArraySpec()} if validation else {}
        return {"images": images, "labels": ArraySpec(dtype="int32")} | weights

    def open(self, *, hint: str = PREPARE) -> "Images":
        """Opens the store and checks that it suits; see `DataConfig`."""
        store = Store.open(self.store, self.version, hint=hint)
        if store.manifest.kind != "images":
            raise ConfigError(f"data.store={self.store}: holds {store.manifest.kind}, not images; name another store")
        height, width, channels = store.manifest.shape
        if height != width:
            raise ConfigError(f"data.store={self.store}: its images are {height} x {width}, not square; prepare others")
        if self.image_size % height:
            fitting = -(-self.image_size // height) * height
            raise ConfigError(
                f"data.image_size={self.image_size}: the images of {store} have {height}, and pixels become whole "
                f"squares; use data.image_size={fitting}"
            )
        if self.channels != channels:
            raise ConfigError(
                f"data.channels={self.channels}: the images of {store} have {channels}; use data.channels={channels}"
            )
        return Images(store, self.seed, partial(ImageSamples, self, store))


class ImageSamples(StoreSamples[ImageData, Store]):
    """Images of a split with their labels: `Samples`."""

    def __init__(self, data: ImageData, store: Store, split: Split, at_most: int | None = None):
        """Counts them, the first `at_most` of them, and reads the labels."""
        super().__init__(data, store, split, store.manifest.splits[split].documents, at_most)
        self._labels = store.read_all(split, LABELS)[: len(self)]

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """`images`, float32 `[B, H, W, channels]` from -1 to 1, and `labels`, int32 `[B]`; weights are ones."""
        with self._reading.running():
            found = self._store.read_ranges(self._split, IMAGES, ids, np.ones_like(ids))
        pixels = found.astype(np.float32) * (2 / self._data.white) - 1
        scale = self._data.image_size // pixels.shape[1]
        batch = {"images": pixels.repeat(scale, axis=1).repeat(scale, axis=2), "labels": self._labels[ids]}
        return batch | {"weights": np.ones(len(ids), np.float32)} if weighted else batch

    @property
    def classes(self) -> int:
        """One more than the largest label."""
        return int(self._labels.max()) + 1


class Classes(Protocol):
    """Says how many classes a model tells apart, to compare with the labels of a store."""

    @property
    def num_classes(self) -> int:
        """Classes that it tells apart."""
        ...


class Images(StoreDataset[Store, ImageSamples]):
    """An open store of images: `Dataset`."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Training samples in lines for people; see `Dataset`."""
        batch, names = self.train.read(ids, weighted=False), self.store.manifest.labels
        shown = zip(ids, batch["images"], batch["labels"], strict=True)
        for row, (sample, image, label) in enumerate(shown, first_row):
            named = f" ({names[label]})" if names else ""
            yield f"row {row}: image {sample}, {'x'.join(map(str, image.shape))}, label {label}{named}"
            yield f"mean {image.mean():.4f}, from {image.min():.4f} to {image.max():.4f}"[:chars]

    def check(self, model: Classes) -> None:
        """Raises ConfigError for a model with fewer classes than there are labels."""
        classes = max(self.train.classes, self.validation().classes, len(self.store.manifest.labels))
        if model.num_classes < classes:
            raise ConfigError(
                f"model.num_classes={model.num_classes}: the images of {self.store} are of {classes} classes; "
                f"use model.num_classes={classes}"
            )
