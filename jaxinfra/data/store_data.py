"""What data of a single store has, of whatever kind: fields of its config, samples of a split, what is open of it.

What a sample is, `tokens`, `pairs` and `image_data` know; data of several stores is in `mixture`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED
from jaxinfra.config.limits import Count, NonEmpty
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.data.order import Curriculum, sample_ids
from jaxinfra.data.stopwatch import Stopwatch
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import Store


@dataclass(frozen=True, kw_only=True)
class StoreData(DataConfig):
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

    def with_versions(self, versions: Sequence[str]) -> Self:
        """See `DataConfig`."""
        return replace(self, version=resolve_version(self.version, next(iter(versions), None)))

    @property
    def recipes(self) -> Mapping[str, str]:
        """See `DataConfig`."""
        return {} if self.recipe is None else {self.store: self.recipe}

    @property
    def units_per_sample(self) -> int:
        """A sample is one, unless it is a row of tokens."""
        return 1

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Samples are whole, unless they are sequences; see `DataConfig`."""
        return {}


def resolve_version(asked: str | None, known: str | None) -> str | None:
    """The version to read where one may be known already: that one, unless another is asked for."""
    return known if known is not None and known.startswith(asked or "") else asked


class StoreSamples[D: StoreData, T: Store]:
    """Of `Samples` what all kinds share."""

    def __init__(self, data: D, store: T, split: Split, found: int, at_most: int | None):
        """Takes how many samples a split has, of which no more than `at_most` count."""
        self._data, self._store = data, store
        self._split: Split = split
        self._count = found if at_most is None else min(at_most, found)
        self._reading = Stopwatch()

    def __len__(self) -> int:
        return self._count

    @property
    def reading_s(self) -> float:
        """See `Samples`."""
        return self._reading.total_s


class StoreDataset[T: Store, S: StoreSamples]:
    """Of `Dataset` what all kinds share."""

    def __init__(
        self, store: T, seed: int, samples: Callable[[Split, int | None], S], curriculum: Curriculum | None = None
    ):
        """Takes what gives the samples of a split, or the first of them."""
        self.store, self._seed, self._samples, self._curriculum = store, seed, samples, curriculum
        self.name, self.fingerprint = str(store), store.manifest.fingerprint
        self.versions: Sequence[str] = (self.fingerprint,)
        self.baselines = store.manifest.baselines
        self.train = samples("train", None)
        self.train_units = len(self.train)

    def sample_ids(self, step: int, global_batch: int) -> np.ndarray:
        """The samples of the global batch of a step, in the order of its rows; see `Dataset`."""
        windows, seed, curriculum = len(self.train), self._seed, self._curriculum
        return sample_ids(step, global_batch=global_batch, windows=windows, seed=seed, curriculum=curriculum)

    def validation(self, at_most: int | None = None) -> S:
        """The validation samples, or the first of them; ConfigError where text is too short for one."""
        return self._samples("validation", at_most)

    def epochs_at(self, step: int, global_batch: int) -> Iterable[str]:
        """See `Dataset`."""
        yield f"{self.name}: {step * global_batch / len(self.train):.3f} epochs before"
