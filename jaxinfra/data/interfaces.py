"""The interfaces of data: a config opens a dataset, whose samples are read by their ids."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np

from jaxinfra.config import Extensible

type Batch = dict[str, np.ndarray]  # arrays by name, such as `inputs`; the first dimension counts the samples
type OnDamage = Literal["stop", "skip"]  # see `DataConfig`


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """One array of a batch, without the batch dimension.

    Attributes:
        shape: shape of the array for one sample.
        dtype: type of its elements.
        axes: logical axis of each dimension, such as "sequence"; None for a dimension that is never sharded.
    """

    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    axes: tuple[str | None, ...] = ()


class Samples(Protocol):
    """A split, as a random-access source of samples."""

    def __len__(self) -> int:
        """Returns the number of samples, at least one."""
        ...

    @property
    def read_time_s(self) -> float:
        """Seconds that threads have spent reading storage inside `read`."""
        return 0.0

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Returns these samples as arrays `[len(ids), ...]`; without `weighted`, `weights` of 1 may be left out."""
        ...


class Dataset(Protocol):
    """An opened data config: the samples of its splits, and the order to read them in."""

    name: str  # for messages
    fingerprint: str  # hash of the contents
    versions: Sequence[str]  # fingerprints of its stores, in the order of the config
    train_units: int  # number of tokens or images in the training split
    baselines: Mapping[str, Mapping[str, float]]  # metric -> simple model -> value on the validation split

    @property
    def train(self) -> Samples:
        """The training split."""
        ...

    def validation(self, limit: int | None = None) -> Samples:
        """Returns the validation split, or its first `limit` samples; ConfigError if it has none."""
        ...

    def sample_ids(self, step: int, global_batch: int) -> np.ndarray:
        """Returns the training samples of the global batch of a step, int64[global_batch]."""
        ...

    def epochs_at(self, step: int, global_batch: int) -> Iterable[str]:
        """Yields a line for each store, with the number of its epochs that were read before a step."""
        ...

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterable[str]:
        """Yields training samples as text, cut to `chars` each; the first one is `first_row` of its global batch."""
        ...

    def check(self, model: Any) -> None:
        """Raises ConfigError if the model cannot read this data, for example because its vocabulary is too small."""
        ...


@runtime_checkable
class KeepsReferences(Protocol):
    """A dataset that keeps what a reference gives for each sample, by split, unless `references` is None."""

    references: dict[str, np.ndarray] | None
    store: Any  # a `data.store.Store`


class DataConfig(Extensible, ABC):
    """Configures what a run reads: a frozen dataclass that inherits from this class.

    Attributes:
        modality: the unit of throughput, such as "token" or "image".
        prefetch_bytes: bytes of host batches to make ahead, at least 1 batch and at most 16.
        threads: threads that make host batches.
        on_damage: "stop" makes a sample that cannot be read an error. "skip" leaves it out by weights of 0, and counts
            it; then batches of training have `weights`, too.
    """

    builtins: ClassVar[tuple[str, ...]] = (
        "jaxinfra.data.tokens:TokenData",
        "jaxinfra.data.mixture:Mixture",
        "jaxinfra.data.image_data:ImageData",
        "jaxinfra.data.pairs:PairData",
        "jaxinfra.data.labeled:LabeledData",
    )
    modality: ClassVar[str] = "sample"
    prefetch_bytes: int = 2**26
    threads: int = 1
    on_damage: OnDamage = "stop"

    @abstractmethod
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns the arrays of a batch by name; a validation batch always has `weights`."""

    def always_weighted(self, *, validation: bool) -> bool:
        """Whether all batches have `weights`: those of validation, and of training if samples may be left out."""
        return validation or self.on_damage == "skip"

    @abstractmethod
    def open(self, *, hint: str) -> Dataset:
        """Opens the data and checks it; `hint` is the command that prepares it, for the message if it is missing.

        Raises ConfigError if the data is missing or does not fit the config, DataError if it is damaged, and
        StorageError if it cannot be read.
        """

    @property
    def units_per_sample(self) -> int:
        """Tokens of a sample, or 1 if samples are counted."""
        return 1

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Config field -> (size, logical axis), for fields that set the size of a sharded dimension."""
        return {}

    def with_versions(self, versions: Sequence[str]) -> Self:
        """Returns the config with these `Dataset.versions`, except where it names other ones; () changes nothing."""
        return self

    @property
    def recipes(self) -> Mapping[str, str]:
        """Store -> config file of the recipe that prepares it."""
        return {}
