"""Pairs of a chosen and a rejected answer: samples of a store of pairs (see `batches`), one document a row."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from jaxinfra.config.limits import Count
from jaxinfra.data.inspect import rows
from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.sequences import packed_batch
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import OFFSETS, PREPARE, TokenStore
from jaxinfra.data.store_data import StoreData, StoreDataset, StoreSamples
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokens import Vocabulary, check_vocabulary, token_batch_spec
from jaxinfra.errors import ConfigError

_log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PairData(StoreData):
    """Pairs of documents that begin alike and end in a chosen and in a rejected answer.

    Attributes:
        seq_len: targets of a row. Of what is longer the last ones are kept: it loses the beginning of its prompt, and
            where the answer alone is longer, that of the answer too (TRL's `truncation_mode="keep_end"`).
    """

    modality: ClassVar[str] = "token"
    seq_len: Count = 1024

    @property
    def mask_documents(self) -> bool:
        """Whether documents are kept apart: a row is one."""
        return True

    @property
    def units_per_sample(self) -> int:
        """Tokens of both sides."""
        return len(SIDES) * self.seq_len

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """See `DataConfig`."""
        return {"seq_len": (self.seq_len, "positions")}

    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns the arrays of `TokenData` for each side of a pair, `chosen_inputs` and so on."""
        row = token_batch_spec(self.seq_len, documents=True, validation=validation)
        weights = {"weights": ArraySpec()} if validation else {}
        return {f"{side}_{name}": spec for side in SIDES for name, spec in row.items()} | weights

    def open(self, *, hint: str = PREPARE) -> "Pairs":
        """Opens the store, checks that it holds pairs, and tells how many are longer than a row; see `DataConfig`."""
        store = TokenStore.open(self.store, self.version, hint=hint)
        if store.manifest.kind != "pairs":
            raise ConfigError(f"data.store={self.store}: holds {store.manifest.kind}, no pairs; name another store")
        opened = Pairs(store, self.seed, partial(PairSamples, self, store))
        targets_B = store.lengths("train").reshape(-1, len(SIDES)).max(axis=1) - 1
        if cut := int((targets_B > self.seq_len).sum()):
            _log.warning(
                f"data.seq_len={self.seq_len}: {cut} of {len(opened.train)} pairs of {store} are longer and lose the "
                f"beginning of their prompt; the longest needs data.seq_len={targets_B.max()}"
            )
        return opened


class PairSamples(StoreSamples[PairData, TokenStore]):
    """The pairs of a split: `Samples`."""

    def __init__(self, data: PairData, store: TokenStore, split: Split, at_most: int | None = None):
        """Counts them, the first `at_most` of them; reads none yet."""
        super().__init__(data, store, split, store.manifest.splits[split].documents // len(SIDES), at_most)

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Arrays of `sequences.packed_batch` of both sides, `chosen_inputs` and so on: `[B, T]`."""
        store, split, seq_len = self._store, self._split, self._data.seq_len
        sides = len(SIDES)
        with self._reading.running():
            borders = store.read_ranges(split, OFFSETS, sides * ids, np.full(len(ids), sides + 1))
            borders_B3 = borders.reshape(-1, sides + 1)
            lengths_P = np.minimum(np.diff(borders_B3, axis=1).reshape(-1) - 1, seq_len)
            starts_P = borders_B3[:, 1:].reshape(-1) - 1 - lengths_P
            tokens_N, mask_N = store.read_segments(split, starts_P, lengths_P + 1)
        one_P = np.ones(len(lengths_P), np.int64)
        batch = packed_batch(tokens_N, lengths_P, one_P, seq_len=seq_len, mask_N=mask_N)
        pairs = {f"{side}_{name}": array[i::sides] for i, side in enumerate(SIDES) for name, array in batch.items()}
        return pairs | {"weights": np.ones(len(ids), np.float32)} if weighted else pairs


class Pairs(StoreDataset[TokenStore, PairSamples]):
    """An open store of pairs: `Dataset`."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Training samples in lines for people; see `Dataset`."""
        batch = self.train.read(ids, weighted=False)
        for side in SIDES:
            yield side
            own = {name.removeprefix(f"{side}_"): array for name, array in batch.items() if name.startswith(side)}
            yield from rows(own, self.store.tokenizer, ids, first_row, chars)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store."""
        return self.store.tokenizer

    def check(self, model: Vocabulary) -> None:
        """Raises ConfigError for a model whose vocabulary is smaller than the store's."""
        check_vocabulary(self.store, model)
