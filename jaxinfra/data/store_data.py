"""Base classes for data of one store: the config, the samples of a split, and the dataset.

`tokens`, `pairs` and `image_data` derive from them; `mixture` reads several stores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self, override

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED
from jaxinfra.config.limits import NonEmptyStr, PositiveInt
from jaxinfra.data.interfaces import DataConfig, OnDamage, Samples
from jaxinfra.data.mixing import OrderedDataset
from jaxinfra.data.order import Curriculum
from jaxinfra.data.stopwatch import Stopwatch
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import Store


@dataclass(frozen=True, kw_only=True)
class StoreData(DataConfig):
    """Config of data from one store.

    Attributes:
        store: folder or URL of the store.
        version: fingerprint of the version to read, or the start of it; None is the newest.
        recipe: config file that prepares the store, for `data prepare RUN` and for messages.
        seed: seed of the order of samples.
        on_damage: "stop" ends the run at a damaged block. "skip" leaves its samples out, by weights of 0, and counts
            and lists them.
    """

    store: Annotated[NonEmptyStr, NOT_FINGERPRINTED]
    version: Annotated[str | None, NOT_FINGERPRINTED] = None
    recipe: Annotated[str | None, NOT_FINGERPRINTED] = None
    seed: int = 0
    prefetch_bytes: Annotated[PositiveInt, NOT_FINGERPRINTED] = 2**26
    threads: Annotated[PositiveInt, NOT_FINGERPRINTED] = 6
    on_damage: Annotated[OnDamage, NOT_FINGERPRINTED] = "stop"  # a run that has stopped can go on with "skip"

    @override
    def with_versions(self, versions: Sequence[str]) -> Self:
        return replace(self, version=resolve_version(self.version, versions[0] if versions else None))

    @property
    @override
    def recipes(self) -> Mapping[str, str]:
        return {} if self.recipe is None else {self.store: self.recipe}


def resolve_version(requested: str | None, known: str | None) -> str | None:
    """Returns the known version, unless another one is requested by its fingerprint or the start of it."""
    return known if known is not None and known.startswith(requested or "") else requested


class StoreSamples[D: StoreData, T: Store](Samples):
    """Samples of one split of a store; subclasses add `read`."""

    def __init__(self, data: D, store: T, split: Split, num_samples: int, limit: int | None):
        """Uses the first `limit` of the `num_samples` samples that the split has; None uses all."""
        self._data, self._store = data, store
        self._split: Split = split
        self._num_samples = num_samples if limit is None else min(limit, num_samples)
        self._read_time = Stopwatch()

    @override
    def __len__(self) -> int:
        return self._num_samples

    @property
    @override
    def read_time_s(self) -> float:
        return self._read_time.total_s


class StoreDataset[T: Store, S: StoreSamples](OrderedDataset):
    """A `Dataset` of one store; subclasses add `format_rows` and `check`.

    Attributes:
        references: what a reference gives for each sample, float32 `[samples, fields]` by split, which a run fills in;
            None for a config without a cached reference.
    """

    references: dict[Split, np.ndarray] | None = None

    def __init__(
        self, store: T, seed: int, open_split: Callable[[Split, int | None], S], curriculum: Curriculum | None = None
    ):
        """Opens the training split; `open_split(split, limit)` returns the samples of a split, or the first `limit`."""
        self.store, self._open_split = store, open_split
        self.name, self.fingerprint = str(store), store.manifest.fingerprint
        self.versions: Sequence[str] = (self.fingerprint,)
        self.baselines = store.manifest.baselines
        self.train = open_split("train", None)
        self.train_units = len(self.train)  # for text, `TokenData.open` sets the number of tokens instead
        super().__init__([self.name], [len(self.train)], seed=seed, curriculum=curriculum)

    def validation(self, limit: int | None = None) -> S:
        """Returns the validation split, or its first `limit` samples; ConfigError if it is too short for one."""
        return self._open_split("validation", limit)
