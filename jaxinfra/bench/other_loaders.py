"""Runs the data loaders of Grain and PyTorch on the files of `bench data`; closing a generator ends its threads.

Import this module only if Grain is installed.
"""

import importlib
from collections.abc import Generator
from contextlib import closing
from typing import Any, override

import grain
import numpy as np
from absl import flags
from grain.sources import ArrayRecordDataSource

from jaxinfra.bench.loader import BATCH_SIZE, SEQ_LEN, TOKEN_DTYPE, TokenFiles


class _Decode(grain.transforms.Map):
    @override
    def map(self, element: bytes) -> Any:
        return np.frombuffer(element, TOKEN_DTYPE)


def grain_map_dataset(files: TokenFiles) -> Generator[np.ndarray, None, None]:
    """Loads ArrayRecord with Grain's `MapDataset` and its default number of threads."""
    records: Any = ArrayRecordDataSource(str(files.records))
    dataset = grain.MapDataset.source(records).seed(0).shuffle().repeat().map(_Decode()).batch(BATCH_SIZE)
    with closing(iter(dataset.to_iter_dataset())) as batches:
        yield from batches


def grain_data_loader(files: TokenFiles) -> Generator[np.ndarray, None, None]:
    """Loads ArrayRecord with Grain's `DataLoader`, without worker processes."""
    records: Any = ArrayRecordDataSource(str(files.records))
    sampler = grain.samplers.IndexSampler(len(records), shuffle=True, seed=0)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which only absl.app.run would parse
    operations = [_Decode(), grain.transforms.Batch(BATCH_SIZE)]
    yield from grain.DataLoader(data_source=records, sampler=sampler, operations=operations, worker_count=0)


def torch_data_loader(files: TokenFiles, *, num_workers: int) -> Generator[object, None, None]:
    """Loads the memory-mapped flat file with PyTorch's `DataLoader`."""
    loader = importlib.import_module("torch.utils.data").DataLoader
    dataset = _WindowDataset(files)
    batches = loader(dataset, batch_size=BATCH_SIZE, shuffle=True, num_workers=num_workers, drop_last=True)
    while True:
        yield from batches


class _WindowDataset:
    """A map-style PyTorch dataset of windows."""

    def __init__(self, files: TokenFiles):
        self._windows = files.windows_at_every_token()[::SEQ_LEN]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._windows[index].copy()  # PyTorch warns about read-only arrays
