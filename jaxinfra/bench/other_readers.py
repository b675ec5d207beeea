"""The loaders of others over the tokens of `bench data`: generators of batches, which end their threads when closed.

Imported only where Grain is installed; PyTorch is imported when its loader is asked for.
"""

import importlib
from collections.abc import Generator
from contextlib import closing
from typing import Any

import grain
import numpy as np
from absl import flags
from grain.sources import ArrayRecordDataSource

from jaxinfra.bench.reading import BATCH, LENGTH, TYPE, Stores


def _window(record: bytes) -> np.ndarray:
    return np.frombuffer(record, TYPE)


def grain_dataset(stores: Stores) -> Generator[np.ndarray, None, None]:
    """Grain over ArrayRecord, as a `MapDataset` with the threads that it has by default."""
    records: Any = ArrayRecordDataSource(str(stores.records))
    dataset = grain.MapDataset.source(records).seed(0).shuffle().repeat().map(_window).batch(BATCH)
    with closing(iter(dataset.to_iter_dataset())) as batches:
        yield from batches


class _Decode(grain.transforms.Map):
    def map(self, element: Any) -> Any:
        return _window(element)


def grain_loader(stores: Stores) -> Generator[np.ndarray, None, None]:
    """Grain over ArrayRecord, as a `DataLoader` that works in this process."""
    records: Any = ArrayRecordDataSource(str(stores.records))
    order = grain.samplers.IndexSampler(len(records), shuffle=True, seed=0)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # it reads flags of absl, which launch has none of
    operations = [_Decode(), grain.transforms.Batch(BATCH)]
    yield from grain.DataLoader(data_source=records, sampler=order, operations=operations, worker_count=0)


def torch(stores: Stores, *, workers: int) -> Generator[Any, None, None]:
    """PyTorch's `DataLoader` over the mapped file."""
    loader = importlib.import_module("torch.utils.data").DataLoader
    batches = loader(_Windows(stores), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
    while True:
        yield from batches


class _Windows:
    """The windows of the mapped file one by one, as PyTorch wants them."""

    def __init__(self, stores: Stores):
        self._windows = stores.memmap()[::LENGTH]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._windows[index].copy()  # PyTorch warns of arrays that may not be written
