"""Preference data: pairs of a chosen and a rejected answer, one document per row, from a store of pairs.

Shape suffixes: B pairs, P = 2B documents in the order chosen, rejected, chosen, ..., N tokens of all documents,
3 offsets of a pair.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, override

import numpy as np

from jaxinfra.config.limits import PositiveInt
from jaxinfra.data.inspect import format_token_rows
from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.sequences import packed_batch
from jaxinfra.data.store.layout import LENGTHS, OFFSETS
from jaxinfra.data.store.manifest import Kind, Split
from jaxinfra.data.store.store import PREPARE, TokenStore
from jaxinfra.data.store_data import StoreData, StoreSamples
from jaxinfra.data.tokens import TokenRows, TokenStoreDataset

_log = logging.getLogger(__name__)
type References = Mapping[Split, np.ndarray] | None

SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class PairData(StoreData, TokenRows):
    """Config of training on pairs of documents with the same prompt and different answers.

    Attributes:
        seq_len: number of targets in a row. A longer document keeps its end, as with `truncation_mode="keep_end"` of
            TRL: it loses the start of its prompt, or even of its answer if that is too long by itself.
        cached_reference: whether the reference of a run computes the log-probabilities of all answers before the first
            step, and the version of the store keeps them, as with `precompute_ref_log_probs` of TRL. Then a step makes
            no forward pass with the reference, and the devices do not hold its parameters.
    """

    sides: ClassVar[tuple[str, ...]] = SIDES
    kind: ClassVar[Kind] = "pairs"
    seq_len: PositiveInt = 1024
    cached_reference: bool = False

    @property
    @override
    def units_per_sample(self) -> int:
        return len(self.sides) * self.seq_len

    @override
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns the arrays of `TokenData` for each side of a sample, `chosen_inputs` and so on."""
        row = super().batch_spec(validation=validation)
        weights = {"weights": ArraySpec()} if self.always_weighted(validation=validation) else {}
        reference = {f"{side}_reference": ArraySpec() for side in self.sides if self.cached_reference}
        return {f"{side}_{name}": spec for side in self.sides for name, spec in row.items()} | reference | weights

    @override
    def open(self, *, hint: str = PREPARE) -> "PairDataset":
        """Opens the store like `DataConfig.open`, and warns how many samples are truncated."""
        lenient = self.on_damage == "skip"
        store = TokenStore.open(self.store, self.version, hint=hint, allow_missing_blocks=lenient, kind=self.kind)
        references = dict[Split, np.ndarray]() if self.cached_reference else None
        dataset = PairDataset(store, self.seed, partial(self.samples, store, references))
        dataset.references = references
        dataset.train_units = len(dataset.train) * self.units_per_sample
        # Targets of the longest document of each sample, one less than its tokens.
        targets_B = store.read_all("train", LENGTHS).reshape(len(dataset.train), -1).max(axis=1) - 1
        if truncated := int((targets_B > self.seq_len).sum()):
            _log.warning(
                f"data.seq_len={self.seq_len}: {truncated} of {len(dataset.train)} samples of {store} are longer and "
                f"lose the start of their prompt; the longest needs data.seq_len={targets_B.max()}"
            )
        return dataset

    def samples(
        self, store: TokenStore, references: References, split: Split, limit: int | None = None
    ) -> "PairSamples":
        """Returns the samples of a split, or the first `limit`."""
        return PairSamples(self, store, references, split, limit)


class PairSamples(StoreSamples[PairData, TokenStore]):
    """The pairs of a split."""

    documents: ClassVar[int] = len(SIDES)  # of a sample

    def __init__(
        self, data: PairData, store: TokenStore, references: References, split: Split, limit: int | None = None
    ):
        """`references` has the reference's values of the splits for which they are known; None leaves them out."""
        super().__init__(data, store, split, store.manifest.splits[split].documents // self.documents, limit)
        self._references, self.sides = references, data.sides

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        with self._read_time.running():
            tokens_N, mask_N, lengths_P = self._read_rows(ids)
        segments_B = np.ones(len(lengths_P), np.int64)  # one document in each row
        rows = packed_batch(tokens_N, lengths_P, segments_B, seq_len=self._data.seq_len, mask_N=mask_N)
        sides, count = self.sides, len(self.sides)
        batch = {f"{side}_{name}": array[i::count] for i, side in enumerate(sides) for name, array in rows.items()}
        if self._references is not None:
            known = self._references.get(self._split)
            values_BF = np.full((len(ids), count), np.nan, np.float32) if known is None else known[ids]
            batch |= {f"{side}_reference": np.ascontiguousarray(values_BF[:, i]) for i, side in enumerate(sides)}
        batch |= self._labels(mask_N, lengths_P)
        return batch | {"weights": np.ones(len(ids), np.float32)} if weighted else batch

    def _labels(self, mask_N: np.ndarray | None, lengths_P: np.ndarray) -> Batch:
        """Returns further arrays of the samples, from the masks of their rows."""
        return {}

    def _read_rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Returns the tokens and masks of the rows of samples, concatenated, and the number of targets of each row."""
        # The documents of a pair follow each other: pair i has the documents 2i and 2i + 1, and the offsets of its
        # tokens are start, border and end. A document of n tokens has n - 1 targets; the last ones are kept.
        store, split, sides = self._store, self._split, len(SIDES)
        bounds_B3 = store.read_ranges(split, OFFSETS, sides * ids, np.full(len(ids), sides + 1)).reshape(-1, 3)
        lengths_P = np.minimum(np.diff(bounds_B3, axis=1).reshape(-1) - 1, self._data.seq_len)
        starts_P = bounds_B3[:, 1:].reshape(-1) - (lengths_P + 1)
        return *store.read_with_mask(split, starts_P, lengths_P + 1), lengths_P


class PairDataset(TokenStoreDataset[PairSamples]):
    """An opened store of pairs, or of labeled completions."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields training samples as text, one side after the other, cut to `chars` each."""
        batch = self.train.read(ids, weighted=False)
        for side in self.train.sides:
            yield side
            own = {name.removeprefix(f"{side}_"): array for name, array in batch.items() if name.startswith(side)}
            yield from format_token_rows(own, self.tokenizer, ids, first_row, chars)
