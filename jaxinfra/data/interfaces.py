"""What a run needs of its data, of whatever kind: a config that opens it, and samples that are read by number."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from jaxinfra.config import Extensible

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a batch, without its dimension of samples.

    Attributes:
        shape: of the array for one sample.
        dtype: of its elements.
        axes: the logical axis of each dimension, such as "sequence"; None for one that is never sharded.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    axes: tuple[str | None, ...] = ()


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


class DataConfig(Extensible, ABC):
    """Data as a config describes it: a frozen dataclass that inherits from this class.

    Attributes:
        modality: what samples are made of, and what speed is counted in: "token" or "image".
        prefetch_bytes: bytes of host batches that are made ahead.
        threads: threads that make host batches.
    """

    builtins: ClassVar[tuple[str, ...]] = (
        "jaxinfra.data.tokens:TokenData",
        "jaxinfra.data.mixture:Mixture",
        "jaxinfra.data.image_data:ImageData",
        "jaxinfra.data.pairs:PairData",
    )
    modality: ClassVar[str] = "sample"
    prefetch_bytes: int = 2**26
    threads: int = 1

    @abstractmethod
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns the arrays of a batch by name; a validation batch always has `weights`."""

    @abstractmethod
    def open(self, *, hint: str) -> Dataset:
        """Opens the data and checks it; `hint` is the command that makes it, for the error when there is none.

        Raises ConfigError where there is none or it does not suit, DataError where it is damaged, StorageError where
        it may not be read.
        """

    @property
    def units_per_sample(self) -> int:
        """Tokens of a sample, or 1 for what is counted whole."""
        return 1

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Config fields that are the size of a sharded dimension, as in `ModelConfig`."""
        return {}

    def with_versions(self, versions: Sequence[str]) -> Self:
        """Returns the config that reads these `Dataset.versions`, unless it names others; () changes nothing."""
        return self

    @property
    def recipes(self) -> Mapping[str, str]:
        """Returns the config files that make the data, by the stores that they make."""
        return {}
