"""Runs jaxinfra's data loader on the files of `bench data`, and measures its startup and memory in a new process.

`python -m jaxinfra.bench.loader REQUEST`, with the arguments of `measure_loader` in JSON, prints a number. Like any
process that only loads data, it does not import JAX.
"""

import json
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jaxinfra.bench.subprocesses import run_module
from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.interfaces import Batch
from jaxinfra.data.sequences import num_sequences
from jaxinfra.data.store.store import TOKENS
from jaxinfra.data.tokens import PackingMode, TokenData
from jaxinfra.track.memory import rss_bytes

SEQ_LEN, BATCH_SIZE = 1024, 64
TOKEN_DTYPE = np.uint16
MEMORY_WARMUP_BATCHES = 500
"""Batches that are loaded before memory is measured for the first time."""


class TokenFiles:
    """The same tokens as a flat file, as a jaxinfra store and as ArrayRecord, in one folder."""

    def __init__(self, folder: Path, num_tokens: int):
        self.folder, self.num_tokens = folder, num_tokens
        self.flat = folder / "tokens.bin"
        self.store = folder / "store"
        self.train_array = str(self.store / "train" / TOKENS)
        self.records = folder / "windows.array_record"  # one window per record
        self.num_windows = num_sequences(num_tokens, SEQ_LEN)  # each shares one token with the next

    def windows_at_every_token(self) -> np.ndarray:
        """Maps the flat file into memory, as views `[num_tokens - SEQ_LEN, SEQ_LEN + 1]`."""
        return sliding_window_view(np.memmap(self.flat, TOKEN_DTYPE, "r"), SEQ_LEN + 1)


def jaxinfra_batches(
    files: TokenFiles, *, mask_documents: bool = True, packing: PackingMode = "concat"
) -> Generator[Batch, None, None]:
    """Yields the batches that a training run gets."""
    data = TokenData(store=str(files.store), seq_len=SEQ_LEN, mask_documents=mask_documents, packing=packing)
    opened = data.open()
    all_rows, endless = slice(None), 2**40
    batches = BatchLoader(
        data,
        opened.train,
        global_batch=BATCH_SIZE,
        rows=all_rows,
        start_step=0,
        steps=endless,
        sample_ids=opened.sample_ids,
    )
    with closing(iter(batches)) as steps:
        for _, batch in steps:
            yield batch


def measure_loader_in_subprocess(kind: Literal["first", "growth"], files: TokenFiles, num_batches: int = 0) -> float:
    """Runs `measure_loader` in a new process."""
    request = {"kind": kind, "folder": str(files.folder), "num_tokens": files.num_tokens, "num_batches": num_batches}
    return float(run_module("loader", 1, **request, start_time_s=time.time()))


def measure_loader(*, kind: str, folder: str, num_tokens: int, num_batches: int, start_time_s: float) -> float:
    """Measures a loader that masks documents.

    Kind "first" returns the seconds from `start_time_s` to the first batch, imports included. Kind "growth" returns the
    bytes by which resident memory grows over `num_batches`.
    """
    with closing(jaxinfra_batches(TokenFiles(Path(folder), num_tokens))) as batches:
        next(batches)
        if kind == "first":
            return time.time() - start_time_s
        for _ in range(MEMORY_WARMUP_BATCHES):
            next(batches)
        before_bytes = rss_bytes()
        for _ in range(num_batches):
            next(batches)
        return rss_bytes() - before_bytes


if __name__ == "__main__":
    print(measure_loader(**json.loads(sys.argv[1])))
