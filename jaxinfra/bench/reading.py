"""Our loader over the tokens of `bench data`, and what it takes that cannot be measured twice in one process.

`python -m jaxinfra.bench.reading REQUEST`, REQUEST in JSON, prints a number. It imports what a process that reads data
does, and no more: no jax.
"""

import json
import resource
import sys
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jaxinfra.bench.children import last_line
from jaxinfra.data.batches import Batches
from jaxinfra.data.interfaces import Batch
from jaxinfra.data.sequences import window_count
from jaxinfra.data.store.store import TOKENS
from jaxinfra.data.tokens import Packing, TokenData

LENGTH, BATCH = 1024, 64
"""A batch is so many windows of so many tokens, and the one that follows."""
TYPE = np.uint16
GROWTH_WARM_UPS = 500
"""Batches before memory is looked at for the first time."""


@dataclass(frozen=True, kw_only=True)
class Stores:
    """The same tokens in three forms.

    Attributes:
        folder: where they are.
        tokens: how many.
    """

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
        return window_count(self.tokens, LENGTH)

    def memmap(self) -> np.ndarray:
        """All windows, as views of the file: [tokens - LENGTH, LENGTH + 1]."""
        return sliding_window_view(np.memmap(self.flat, TYPE, "r"), LENGTH + 1)


def jaxinfra(
    stores: Stores, *, mask_documents: bool = True, packing: Packing = "windows"
) -> Generator[Batch, None, None]:
    """The batches of a run."""
    data = TokenData(store=str(stores.store), seq_len=LENGTH, mask_documents=mask_documents, packing=packing)
    found = data.open()
    batches = Batches(data, found.train, global_batch=BATCH, rows=slice(None), start_step=0, steps=2**40, ids=found.ids)
    with closing(iter(batches)) as steps:
        for _, batch in steps:
            yield batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a process of its own measures, of the batches of a run with documents masked.

    Attributes:
        kind: seconds to the "first" batch, imports and all; or "growth" of the resident memory in bytes.
        folder: see `Stores`.
        tokens: see `Stores`.
        batches: read while memory grows, after those that warm it up.
        sent_s: when it was sent, by the clock.
    """

    kind: Literal["first", "growth"]
    folder: str
    tokens: int
    batches: int = 0
    sent_s: float = 0.0


def ask(request: Request) -> float:
    """Starts the process and reads its answer."""
    words = asdict(request) | {"sent_s": time.time()}
    return last_line([sys.executable, "-m", "jaxinfra.bench.reading", json.dumps(words)], 1)


def answer(request: Request) -> float:
    """The answer to a request."""
    stores = Stores(folder=Path(request.folder), tokens=request.tokens)
    with closing(jaxinfra(stores)) as batches:
        next(batches)
        if request.kind == "first":
            return time.time() - request.sent_s
        for _ in range(GROWTH_WARM_UPS):
            next(batches)
        before = _resident_bytes()
        for _ in range(request.batches):
            next(batches)
        return _resident_bytes() - before


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    print(answer(Request(**json.loads(sys.argv[1]))))
