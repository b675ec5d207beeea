"""Completions with labels: each row of a store is a prompt with a completion that is desirable or not.

Shape suffixes: B samples, D = 2B documents, N tokens of all rows, 2 start and end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, override

import numpy as np

from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.pairs import PairData, PairSamples, References
from jaxinfra.data.store.layout import OFFSETS
from jaxinfra.data.store.manifest import Kind, Split
from jaxinfra.data.store.store import TokenStore

DESIRABLE, UNDESIRABLE = 1, 2
"""Masks of the tokens of a completion."""
_DISTANCE = (
    0.618  # to the other sample, as a share of the split: records with the same prompt are seldom that far apart
)


@dataclass(frozen=True, kw_only=True)
class LabeledData(PairData):
    """Config of training on completions that are desirable or not, each beside a mismatched one.

    A sample has its prompt with its own completion, with the completion of another sample, and a `label`. The other
    sample is the same in every epoch and run. Fields are those of `PairData`.
    """

    sides: ClassVar[tuple[str, ...]] = ("completion", "mismatched")
    kind: ClassVar[Kind] = "labeled"

    @override
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        return {**super().batch_spec(validation=validation), "label": ArraySpec()}

    @override
    def samples(
        self, store: TokenStore, references: References, split: Split, limit: int | None = None
    ) -> "LabeledSamples":
        return LabeledSamples(self, store, references, split, limit)


class LabeledSamples(PairSamples):
    """The completions of a split."""

    documents = 1

    @override
    def _labels(self, mask_N: np.ndarray | None, lengths_P: np.ndarray) -> Batch:
        assert mask_N is not None, "stores of labeled completions have masks"
        starts_P = np.cumsum(lengths_P + 1) - lengths_P - 1
        return {"label": (np.maximum.reduceat(mask_N, starts_P)[:: len(self.sides)] == DESIRABLE).astype(np.float32)}

    @override
    def _read_rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        store, split, count = self._store, self._split, self._store.manifest.splits[self._split].documents
        others = (ids + max(round(_DISTANCE * count), 1)) % count
        bounds_D2 = store.read_ranges(split, OFFSETS, np.stack([ids, others], 1).reshape(-1), np.full(2 * len(ids), 2))
        start_D, end_D = bounds_D2.reshape(-1, 2).T
        tokens_N, mask_N = store.read_with_mask(split, start_D, end_D - start_D)
        assert mask_N is not None, "stores of labeled completions have masks"
        cuts = np.cumsum(end_D - start_D)[:-1]
        documents = [*zip(np.split(tokens_N, cuts), np.split(mask_N, cuts), strict=True)]
        rows = list[tuple[np.ndarray, np.ndarray]]()
        for own, other in zip(documents[::2], documents[1::2], strict=True):
            prompt, completion = slice(0, np.argmax(own[1] != 0)), slice(np.argmax(other[1] != 0), None)
            mixed = (np.concatenate([mine[prompt], its[completion]]) for mine, its in zip(own, other, strict=True))
            rows += [own, (*mixed,)]
        kept = [(tokens[-self._data.seq_len - 1 :], mask[-self._data.seq_len - 1 :]) for tokens, mask in rows]
        lengths_P = np.array([len(tokens) - 1 for tokens, _ in kept])
        return np.concatenate([each for each, _ in kept]), np.concatenate([each for _, each in kept]), lengths_P
