"""What data of a single store has, of whatever kind: fields of its config, samples of a split, what is open of it.

What a sample is, `tokens`, `pairs` and `image_data` know; data of several stores is in `mixture`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED
from jaxinfra.config.limits import Count, NonEmpty
from jaxinfra.data.order import sample_ids
from jaxinfra.data.stopwatch import Stopwatch
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import Store


@dataclass(frozen=True, kw_only=True)
class OneStore:
    """Where samples are read from, and how; of `DataConfig` what all kinds share.

    Attributes:
        store: folder or URL of the store.
        version: fingerprint of the version to read, or its beginning; None is the newest.
        recipe: config file that makes the store, for `data prepare` of a run and for messages.
        seed: of the order of samples.
        prefetch_bytes: of host batches that are made ahead; at least one is, and at most 16 are.
        threads: threads that make host batches.
    """

    store: Annotated[NonEmpty, NOT_FINGERPRINTED]
    version: Annotated[str | None, NOT_FINGERPRINTED] = None
    recipe: Annotated[str | None, NOT_FINGERPRINTED] = None
    seed: int = 0
    prefetch_bytes: Annotated[Count, NOT_FINGERPRINTED] = 2**26
    threads: Annotated[Count, NOT_FINGERPRINTED] = 6

    def pinned(self, versions: Sequence[str]) -> Self:
        """See `DataConfig`."""
        return replace(self, version=pinned(self.version, versions[0]) if versions else self.version)

    @property
    def recipes(self) -> Mapping[str, str]:
        """See `DataConfig`."""
        return {} if self.recipe is None else {self.store: self.recipe}


def pinned(asked: str | None, known: str) -> str:
    """The version to read where one is known already: that one, unless another is asked for."""
    return known if asked is None or known.startswith(asked) else asked


class SplitSamples:
    """Of `Samples` what all kinds share."""

    def __init__(self, split: Split, found: int, at_most: int | None):
        """Takes how many samples a split has, of which no more than `at_most` count."""
        self._split: Split = split
        self._count = found if at_most is None else min(at_most, found)
        self._reading = Stopwatch()

    def __len__(self) -> int:
        return self._count

    @property
    def reading_s(self) -> float:
        """See `Samples`."""
        return self._reading.total_s


class OpenStore[S: SplitSamples]:
    """Of `OpenData` what all kinds share."""

    def __init__(self, data: OneStore, store: Store, train: S):
        """Takes the samples to train on."""
        self._seed = data.seed
        self.name, self.fingerprint = str(store), store.manifest.fingerprint
        self.baselines = store.manifest.baselines
        self.train, self.train_units = train, len(train)

    @property
    def versions(self) -> Sequence[str]:
        """See `OpenData`."""
        return (self.fingerprint,)

    def ids(self, step: int, global_batch: int) -> np.ndarray:
        """The samples of the global batch of a step, in the order of its rows; see `OpenData`."""
        return sample_ids(step, global_batch=global_batch, windows=len(self.train), seed=self._seed)

    def before(self, step: int, global_batch: int) -> Iterable[str]:
        """See `OpenData`."""
        yield f"{self.name}: {step * global_batch / len(self.train):.3f} epochs before"
