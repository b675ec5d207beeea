"""What a run needs of its data, of whatever kind: a config that opens it, and samples that are read by number."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import numpy as np

Batch = dict[str, np.ndarray]


class Samples(Protocol):
    """One split of the data, in samples that are read by number."""

    def __len__(self) -> int:
        """How many, at least one."""
        ...

    @property
    def reading_s(self) -> float:
        """Seconds that threads have spent in reading what is stored, as a part of `read`."""
        ...

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """These samples as rows of arrays; `weighted` ones always have `weights`."""
        ...


class Dataset(Protocol):
    """Data that was found and looked at."""

    name: str  # what messages call it
    fingerprint: str  # of its contents
    versions: Sequence[str]  # fingerprints of the stores that it is read from, in the order of the config
    train_units: int  # units (tokens, images) that the samples to train on have
    baselines: Mapping[str, Mapping[str, float]]  # by score, what simple models reach on validation samples, by name

    @property
    def train(self) -> Samples:
        """The samples to train on."""
        ...

    def sample_ids(self, step: int, global_batch: int) -> np.ndarray:
        """The samples of the global batch of a step, int64[global_batch]: a function of nothing but the config."""
        ...

    def epochs_at(self, step: int, global_batch: int) -> Iterable[str]:
        """What is read, and how often it was when a step begins, in lines for people."""
        ...

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterable[str]:
        """Training samples in lines for people, `chars` of each; `first_row` is the first's in the global batch."""
        ...

    def validation(self, at_most: int | None = None) -> Samples:
        """The validation samples, or the first of them; ConfigError where there are none."""
        ...

    def check(self, model: Any) -> None:
        """Raises ConfigError for a model that cannot read what is there."""
        ...


class DataConfig(Protocol):
    """Data as a config describes it."""

    modality: ClassVar[str]  # what it is counted in: "token" or "image"

    @property
    def prefetch_bytes(self) -> int:
        """Of host batches that are made ahead."""
        ...

    @property
    def threads(self) -> int:
        """Threads that make host batches."""
        ...

    @property
    def units_per_sample(self) -> int:
        """Units of one sample."""
        ...

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Fields whose dimensions are sharded, as in `ModelConfig`."""
        ...

    def open(self, *, hint: str) -> Dataset:
        """Finds the data and looks at it; `fix` is the command that makes it, for the error when there is none.

        Raises ConfigError where there is none or it does not suit, DataError where it is damaged, StorageError where
        it may not be read.
        """
        ...

    def with_versions(self, versions: Sequence[str]) -> Self:
        """The config that reads these `Dataset.versions`, where it does not name others itself; () pins nothing."""
        ...

    @property
    def recipes(self) -> Mapping[str, str]:
        """Config files that make it, by the stores that they make."""
        ...
