"""Runs jaxinfra's data loader on the files of `bench data`, and measures its startup and memory.

Like any process that only loads data, it does not import JAX; PyTorch's workers import it, too.
"""

import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.interfaces import Batch
from jaxinfra.data.sequences import num_sequences
from jaxinfra.data.store.layout import TOKENS
from jaxinfra.data.tokens import PackingMode, TokenData
from jaxinfra.track.memory import rss_bytes

SEQ_LEN, BATCH_SIZE = 1024, 64
TOKEN_DTYPE = np.uint16
MEMORY_WARMUP_BATCHES = 500  # before memory is measured for the first time


class TokenFiles:
    """The same tokens as a flat file, as a jaxinfra store and as ArrayRecord, in one folder."""

    def __init__(self, folder: Path, num_tokens: int):
        self.folder, self.num_tokens = folder, num_tokens
        self.flat = folder / "tokens.bin"
        self.store = folder / "store"
        self.train_array = str(self.store / "train" / TOKENS)
        self.records = folder / "windows.array_record"  # one window per record
        # Windows of SEQ_LEN + 1 tokens, SEQ_LEN apart: the last token of one is the first of the next.
        self.num_windows = num_sequences(num_tokens, SEQ_LEN)

    def windows_at_every_token(self) -> np.ndarray:
        """Maps the flat file into memory, as views `[num_tokens - SEQ_LEN, SEQ_LEN + 1]`."""
        return sliding_window_view(np.memmap(self.flat, TOKEN_DTYPE, "r"), SEQ_LEN + 1)


class WindowDataset:
    """A map-style PyTorch dataset of windows."""

    def __init__(self, files: TokenFiles):
        self._windows = files.windows_at_every_token()[::SEQ_LEN]

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._windows[index].copy()  # PyTorch warns about read-only arrays


def jaxinfra_batches(
    files: TokenFiles, *, mask_documents: bool = True, packing: PackingMode = "concat"
) -> Generator[Batch, None, None]:
    """Yields the batches that a training run gets."""
    data = TokenData(store=str(files.store), seq_len=SEQ_LEN, mask_documents=mask_documents, packing=packing)
    opened = data.open()
    batches = BatchLoader(
        data,
        opened.train,
        global_batch=BATCH_SIZE,
        rows=slice(None),  # all rows: there is one process
        start_step=0,
        steps=2**40,  # endless
        sample_ids=opened.sample_ids,
    )
    with closing(iter(batches)) as steps:
        for _, batch in steps:
            yield batch


def first_batch_s(files: TokenFiles, start_time_s: float) -> float:
    """Returns the seconds from `start_time_s`, when this process started, to the first batch, imports included."""
    with closing(jaxinfra_batches(files)) as batches:
        next(batches)
        return time.time() - start_time_s


def memory_growth_bytes(files: TokenFiles, num_batches: int) -> int:
    """Returns the bytes by which resident memory grows while `num_batches` are loaded, after a warm-up."""
    with closing(jaxinfra_batches(files)) as batches:
        for _ in range(MEMORY_WARMUP_BATCHES):
            next(batches)
        before_bytes = rss_bytes()
        for _ in range(num_batches):
            next(batches)
        return rss_bytes() - before_bytes
