"""The recipe of a store of images with labels, as a config file describes it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.data.corpus import SHARD_BYTES, common_problems
from jaxinfra.data.records.sources import AnySource


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """How a store of images is made; all have one shape.

    Attributes:
        store: folder or URL of the store; its versions stand in it beside one another.
        source: where the records are.
        image: field of the image: uint8 (height, width, channels) or (height, width), or nested lists of such.
        label: field of its class, a number from 0.
        classes: names of the classes, in the order of their numbers; () where they have none.
        heldout_fraction: expected share of the images that is never trained on, above 0 and below 1.
        on_bad: what a record does that cannot be used: end the work, or be left out, counted and listed.
        baselines: whether to measure how often the nearest training image is of the right class; for small sets.
        shard_bytes: of the source, read by a worker at a time.
        work: folder for what is in the making (see `Corpus`).
    """

    store: str
    source: AnySource
    image: str = "image"
    label: str = "label"
    classes: tuple[str, ...] = ()
    heldout_fraction: float = 0.05
    on_bad: Literal["fail", "skip"] = "fail"
    baselines: bool = False
    shard_bytes: int = SHARD_BYTES
    work: str | None = None

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the recipe itself; nothing is looked up."""
        yield from common_problems(self.store, self.heldout_fraction, self.shard_bytes, self.work)
        for name in ("image", "label"):
            if not getattr(self, name):
                yield Problem(fields=(name,), message="names no field", fix=f"use {name}={name}")
