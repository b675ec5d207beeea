"""Our loader over the tokens of `bench data`, and what it takes that cannot be measured twice in one process.

`python -m jaxinfra.bench.reading REQUEST`, REQUEST in JSON, prints a number. It imports what a process that reads data
does, and no more: no jax.
"""

import json
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jaxinfra.bench.children import asked
from jaxinfra.data.batches import BatchLoader
from jaxinfra.data.interfaces import Batch
from jaxinfra.data.sequences import num_sequences
from jaxinfra.data.store.store import TOKENS
from jaxinfra.data.tokens import PackingMode, TokenData
from jaxinfra.track.memory import rss_bytes

LENGTH, BATCH = 1024, 64
"""A batch is so many windows of so many tokens, and the one that follows."""
TYPE = np.uint16
GROWTH_WARM_UPS = 500
"""Batches before memory is looked at for the first time."""


@dataclass(frozen=True, kw_only=True)
class Stores:
    """The same tokens, so many, in three forms in a folder."""

    folder: Path
    tokens: int

    @property
    def flat(self) -> Path:
        """The bare tokens."""
        return self.folder / "tokens.bin"

    @property
    def store(self) -> Path:
        """A version of a store."""
        return self.folder / "store"

    @property
    def array(self) -> str:
        """Its tokens to train on."""
        return str(self.store / "train" / TOKENS)

    @property
    def records(self) -> Path:
        """A window a record."""
        return self.folder / "windows.array_record"

    @property
    def windows(self) -> int:
        """Windows that share a token each with the next."""
        return num_sequences(self.tokens, LENGTH)

    def memmap(self) -> np.ndarray:
        """All windows, as views of the file: [tokens - LENGTH, LENGTH + 1]."""
        return sliding_window_view(np.memmap(self.flat, TYPE, "r"), LENGTH + 1)


def jaxinfra(
    stores: Stores, *, mask_documents: bool = True, packing: PackingMode = "concat"
) -> Generator[Batch, None, None]:
    """The batches of a run."""
    data = TokenData(store=str(stores.store), seq_len=LENGTH, mask_documents=mask_documents, packing=packing)
    found = data.open()
    batches = BatchLoader(
        data, found.train, global_batch=BATCH, rows=slice(None), start_step=0, steps=2**40, ids=found.sample_ids
    )
    with closing(iter(batches)) as steps:
        for _, batch in steps:
            yield batch


def ask(kind: Literal["first", "growth"], stores: Stores, batches: int = 0) -> float:
    """Measures in a process of its own; see `answer`."""
    sent_s = time.time()
    where = str(stores.folder)
    return asked("reading", 1, kind=kind, folder=where, tokens=stores.tokens, batches=batches, sent_s=sent_s)


def answer(*, kind: str, folder: str, tokens: int, batches: int, sent_s: float) -> float:
    """Measures the batches of a run with documents masked, from `Stores`.

    By kind these are the seconds to the "first" batch since `sent_s` by the clock, imports and all, or the "growth" of
    the resident memory in bytes over so many batches, after those that warm it up.
    """
    with closing(jaxinfra(Stores(folder=Path(folder), tokens=tokens))) as steps:
        next(steps)
        if kind == "first":
            return time.time() - sent_s
        for _ in range(GROWTH_WARM_UPS):
            next(steps)
        before = rss_bytes()
        for _ in range(batches):
            next(steps)
        return rss_bytes() - before


if __name__ == "__main__":
    print(answer(**json.loads(sys.argv[1])))
