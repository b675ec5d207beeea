"""Training on images: the handwritten digits that scikit-learn ships (Alpaydin and Kaynak 1998), no network needed.

1,797 grey images of 8 x 8 pixels, from 0 to 16. They are in memory whole; a sample is an image and its digit.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.contract import Batch, Progress
from jaxinfra.data.order import epoch_keys, permute
from jaxinfra.errors import ConfigError

SIDE, DARKEST, CLASSES = 8, 16, 10


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Training on scikit-learn's digits.

    Attributes:
        image_size: pixels of a side, a multiple of 8: every pixel becomes a square.
        heldout_fraction: share of the images that is held out; which ones depends on nothing else.
        seed: of the order of images.
        prefetch: host batches that are made ahead.
        threads: threads that make host batches.
    """

    unit: ClassVar[str] = "image"
    image_size: int = SIDE
    heldout_fraction: float = 0.2
    seed: int = 0
    prefetch: int = 4
    threads: int = 1

    def problems(self) -> Iterable[Problem]:
        """Pixels become whole squares, and both splits are needed."""
        for name in ("image_size", "prefetch", "threads"):
            if getattr(self, name) < 1:
                yield Problem(fields=(name,), message="must be at least 1", fix=f"use {name}={SIDE}")
        if self.image_size % SIDE:
            fitting = -(-self.image_size // SIDE) * SIDE
            yield Problem(
                fields=("image_size",), message=f"must be a multiple of {SIDE}", fix=f"use image_size={fitting}"
            )
        if not 0.01 <= self.heldout_fraction <= 0.99:
            yield Problem(
                fields=("heldout_fraction",),
                message="must be from 0.01 to 0.99: both splits are needed",
                fix="use heldout_fraction=0.2",
            )

    @property
    def channels(self) -> int:
        """They are grey."""
        return 1

    @property
    def sample_units(self) -> int:
        """An image is one."""
        return 1

    @property
    def spread(self) -> Mapping[str, tuple[int, str]]:
        """Images are whole (see `DataConfig`)."""
        return {}

    def open(self, *, fix: str = "") -> "OpenDigits":
        """Reads the images.

        Raises:
            ConfigError: scikit-learn is not installed.
        """
        return OpenDigits(self, *_load())

    def prepare(self, progress: Progress) -> Sequence[str]:
        """Reads the images, and says how many there are; there is nothing to make.

        Raises:
            ConfigError: scikit-learn is not installed.
        """
        found = self.open()
        (nearest,) = found.baselines["accuracy"].values()
        return [
            f"images     {found.name}, fingerprint {found.fingerprint}",
            f"train      {len(found.train)} images",
            f"heldout    {len(found.heldout())} images",
            f"to beat    {nearest:.4f} of them right by the nearest training image",
        ]


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 8, 8]` from 0 to 16, and their digits `[N]`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "data=digits: the images come with scikit-learn, which is not installed; "
            "run pip install scikit-learn, or install jaxinfra with its extra digits"
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    return np.asarray(pixels, np.float32).reshape(-1, SIDE, SIDE), np.asarray(digits, np.int32)


class Labelled:
    """Images with labels, in memory: `Samples`."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        """Takes `[N, H, W, channels]`, float32, and `[N]`, int32."""
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Images and labels; weights are ones."""
        batch = {"images": self.images[ids], "labels": self.labels[ids]}
        return batch | {"weights": np.ones(len(ids), np.float32)} if weighted else batch


class Classes(Protocol):
    """What must be known of a model to learn digits."""

    @property
    def classes(self) -> int:
        """That an image may be of."""
        ...


class OpenDigits:
    """The digits, read: `OpenData`."""

    def __init__(self, data: Digits, images: np.ndarray, labels: np.ndarray):
        """Takes images `[N, 8, 8]` and digits `[N]`."""
        self.name = "digits of scikit-learn"
        self.fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
        count, scale = len(labels), data.image_size // SIDE
        place = permute(np.arange(count), size=count, key=epoch_keys(0, np.zeros(1, np.uint64)))
        self._is_heldout = place < round(count * data.heldout_fraction)
        pixels = 2 * images[..., None] / DARKEST - 1
        self._pixels, self._labels = pixels.repeat(scale, axis=1).repeat(scale, axis=2), labels
        self.train = self._labelled(~self._is_heldout)
        self.train_units = len(self.train)

    def _labelled(self, chosen: np.ndarray, at_most: int | None = None) -> Labelled:
        return Labelled(self._pixels[chosen][:at_most], self._labels[chosen][:at_most])

    def heldout(self, at_most: int | None = None) -> Labelled:
        """The held-out images."""
        return self._labelled(self._is_heldout, at_most)

    def check(self, model: Classes) -> None:
        """Refuses a model with fewer classes than there are digits.

        Raises:
            ConfigError: it has.
        """
        if model.classes < CLASSES:
            raise ConfigError(
                f"model.classes={model.classes}: the {self.name} are of {CLASSES} classes; use model.classes={CLASSES}"
            )

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """How often the nearest training image is of the right digit."""
        train, heldout = ((s.images.reshape(len(s), -1), s.labels) for s in (self.train, self.heldout()))
        distance = (train[0] ** 2).sum(-1) - 2 * heldout[0] @ train[0].T
        found = train[1][distance.argmin(axis=1)]
        return {"accuracy": {"nearest neighbour": float((found == heldout[1]).mean())}}
