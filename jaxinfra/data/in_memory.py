"""Data from NumPy arrays in memory: the shortest way to train on your own data."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import override

import numpy as np

from jaxinfra.data.interfaces import ArraySpec, Batch, DataConfig, Samples
from jaxinfra.data.mixing import OrderedDataset
from jaxinfra.data.store.manifest import Split
from jaxinfra.errors import ConfigError
from jaxinfra.user_code import user_code_errors


class ArrayData(DataConfig):
    """Data in memory: a frozen dataclass that inherits from this class and defines `arrays`.

    Attributes:
        seed: seed of the order of samples.
    """

    seed: int = 0

    @abstractmethod
    def arrays(self, split: Split) -> Batch:
        """Returns the arrays of all samples of "train" or "validation" by name, each `[samples, ...]`.

        It must return the same arrays on every call. `weights` are optional: `[samples]`, or like `targets` if there
        are any.
        """

    @property
    def seq_len(self) -> int:
        """Length of the `inputs` of a sample, for models of sequences."""
        return _arrays(self, "train")["inputs"].shape[1]

    @property
    @override
    def units_per_sample(self) -> int:
        return self.seq_len if self.modality == "token" else 1

    @override
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        arrays = _arrays(self, "train")
        specs = {
            name: ArraySpec(shape=array.shape[1:], dtype=str(array.dtype), axes=(None,) * (array.ndim - 1))
            for name, array in arrays.items()
        }
        weights = replace(specs.get("targets", ArraySpec()), dtype="float32")
        return {"weights": weights, **specs} if validation else specs

    @override
    def open(self, *, hint: str = "") -> "ArrayDataset":
        return ArrayDataset(self)


class ArraySamples(Samples):
    """The samples of one split."""

    def __init__(self, arrays: Batch, limit: int | None = None):
        self._arrays = {name: array[:limit] for name, array in arrays.items()}

    @override
    def __len__(self) -> int:
        return len(next(iter(self._arrays.values())))

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        batch = {name: array[ids] for name, array in self._arrays.items()}
        shape = batch["targets"].shape if "targets" in batch else (len(ids),)
        return {"weights": np.ones(shape, np.float32), **batch} if weighted else batch


class ArrayDataset(OrderedDataset):
    """The `Dataset` of arrays in memory."""

    versions: Sequence[str] = ()

    def __init__(self, config: ArrayData):
        self._config, self.name = config, type(config).__qualname__
        arrays = {split: _arrays(config, split) for split in ("train", "validation")}
        self.fingerprint = _digest(arrays)
        self.baselines: Mapping[str, Mapping[str, float]] = {}
        self.train = ArraySamples(arrays["train"])
        self.train_units = len(self.train) * config.units_per_sample
        super().__init__([self.name], [len(self.train)], seed=config.seed)

    def validation(self, limit: int | None = None) -> ArraySamples:
        """Returns the validation split, or its first `limit` samples."""
        return ArraySamples(_arrays(self._config, "validation"), limit)

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields a line for each array of each training sample, cut to `chars`."""
        batch = self.train.read(ids, weighted=False)
        for row, sample in enumerate(ids):
            yield f"row {first_row + row}: sample {sample}"
            yield from (f"{name} {' '.join(str(array[row]).split())}"[:chars] for name, array in batch.items())

    def check(self, model: object) -> None:
        """Accepts every model."""


@lru_cache(maxsize=4)  # both splits of two configs: `batch_spec` and `open` ask for them again
def _arrays(config: ArrayData, split: Split) -> Batch:
    """Returns the arrays of a split; ConfigError if they are not NumPy arrays of equally many samples."""
    where = f"{type(config).__qualname__}.arrays({split!r})"
    with user_code_errors(type(config), "data"):
        arrays = config.arrays(split)
    if not isinstance(arrays, dict) or not arrays:
        raise ConfigError(f'{where}: returned {type(arrays).__name__}; return a dict, such as {{"inputs": array}}')
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or not array.ndim:
            raise ConfigError(f"{where}: {name} is not a NumPy array [samples, ...]; use numpy.asarray")
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ConfigError(f"{where}: has {sizes} samples; return one or more, and the same number in every array")
    return arrays


def _digest(arrays: Mapping[str, Batch]) -> str:
    """Returns a hash of all names, types, shapes and values."""
    digest = hashlib.sha256()
    for split, batch in arrays.items():
        for name, array in sorted(batch.items()):
            digest.update(f"{split} {name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
