"""Preference data: pairs of a chosen and a rejected answer, one document per row, from a store of pairs.

Shape suffixes: B pairs, P = 2B documents in the order chosen, rejected, chosen, ..., N tokens of all documents,
3 offsets of a pair.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import override

import numpy as np

from jaxinfra.config.limits import PositiveInt
from jaxinfra.data.inspect import format_token_rows
from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.sequences import packed_batch
from jaxinfra.data.store.layout import LENGTHS, OFFSETS
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import PREPARE, TokenStore
from jaxinfra.data.store_data import StoreData, StoreSamples
from jaxinfra.data.tokens import TokenRows, TokenStoreDataset

_log = logging.getLogger(__name__)

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PairData(StoreData, TokenRows):
    """Config of training on pairs of documents with the same prompt and different answers.

    Attributes:
        seq_len: number of targets in a row. A longer document keeps its end, as with `truncation_mode="keep_end"` of
            TRL: it loses the start of its prompt, or even of its answer if that is too long by itself.
    """

    seq_len: PositiveInt = 1024

    @property
    @override
    def units_per_sample(self) -> int:
        return len(SIDES) * self.seq_len

    @override
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns the arrays of `TokenData` for each side of a pair, `chosen_inputs` and so on."""
        row = super().batch_spec(validation=validation)
        weights = {"weights": ArraySpec()} if self.always_weighted(validation=validation) else {}
        return {f"{side}_{name}": spec for side in SIDES for name, spec in row.items()} | weights

    @override
    def open(self, *, hint: str = PREPARE) -> "PairDataset":
        """Opens the store like `DataConfig.open`, and warns how many pairs are truncated."""
        lenient = self.on_damage == "skip"
        store = TokenStore.open(self.store, self.version, hint=hint, allow_missing_blocks=lenient, kind="pairs")
        dataset = PairDataset(store, self.seed, partial(PairSamples, self, store))
        # Targets of the longer document of each pair, one less than its tokens.
        targets_B = store.read_all("train", LENGTHS).reshape(-1, len(SIDES)).max(axis=1) - 1
        if truncated := int((targets_B > self.seq_len).sum()):
            _log.warning(
                f"data.seq_len={self.seq_len}: {truncated} of {len(dataset.train)} pairs of {store} are longer and "
                f"lose the start of their prompt; the longest needs data.seq_len={targets_B.max()}"
            )
        return dataset


class PairSamples(StoreSamples[PairData, TokenStore]):
    """The pairs of a split."""

    def __init__(self, data: PairData, store: TokenStore, split: Split, limit: int | None = None):
        super().__init__(data, store, split, store.manifest.splits[split].documents // len(SIDES), limit)

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        store, split, sides = self._store, self._split, len(SIDES)
        with self._read_time.running():
            # The documents of a pair follow each other: pair i has the documents 2i and 2i + 1, and the offsets of its
            # tokens are start, border and end. A document of n tokens has n - 1 targets; the last ones are kept.
            bounds_B3 = store.read_ranges(split, OFFSETS, sides * ids, np.full(len(ids), sides + 1)).reshape(-1, 3)
            lengths_P = np.minimum(np.diff(bounds_B3, axis=1).reshape(-1) - 1, self._data.seq_len)
            starts_P = bounds_B3[:, 1:].reshape(-1) - (lengths_P + 1)
            tokens_N, mask_N = store.read_with_mask(split, starts_P, lengths_P + 1)
        segments_B = np.ones(len(lengths_P), np.int64)  # one document in each row
        batch = packed_batch(tokens_N, lengths_P, segments_B, seq_len=self._data.seq_len, mask_N=mask_N)
        pairs = {f"{side}_{name}": array[i::sides] for i, side in enumerate(SIDES) for name, array in batch.items()}
        return pairs | {"weights": np.ones(len(ids), np.float32)} if weighted else pairs


class PairDataset(TokenStoreDataset[PairSamples]):
    """An opened store of pairs."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields training samples as text, chosen then rejected answers, cut to `chars` each."""
        batch = self.train.read(ids, weighted=False)
        for side in SIDES:
            yield side
            own = {name.removeprefix(f"{side}_"): array for name, array in batch.items() if name.startswith(side)}
            yield from format_token_rows(own, self.tokenizer, ids, first_row, chars)
