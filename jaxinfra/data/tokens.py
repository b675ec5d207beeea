"""Text for language models, from a token store: sequences of consecutive tokens, or rows of packed documents.

Shape suffixes: B rows of a batch, W = seq_len + 1 tokens of a row, P packed segments of all rows, N tokens of all rows,
V ids of the vocabulary, 2 a first element and a second one.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Literal, override

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveInt
from jaxinfra.data.batches import validation_batches
from jaxinfra.data.inspect import format_token_rows
from jaxinfra.data.interfaces import ArraySpec, Batch, DataConfig
from jaxinfra.data.order import Curriculum
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.sequences import num_sequences, packed_batch, split_inputs_targets
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import PREPARE, TokenStore, read_tokens_together
from jaxinfra.data.store_data import StoreData, StoreDataset, StoreSamples
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import ConfigError

PackingMode = Literal["concat", "best_fit", "best_fit_by_length"]


class TokenRows(DataConfig):
    """Base class of configs whose samples are rows of tokens; `TokenData` describes the fields."""

    modality: ClassVar[str] = "token"
    seq_len: int = 1024
    mask_documents: bool = True

    @property
    @override
    def units_per_sample(self) -> int:
        return self.seq_len

    @property
    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {"seq_len": (self.seq_len, "positions")}

    @override
    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        names = ("inputs", "targets", "segments", "positions") if self.mask_documents else ("inputs", "targets")
        row = ArraySpec(shape=(self.seq_len,), dtype="int32", axes=("sequence",))
        has_weights = self.mask_documents or self.always_weighted(validation=validation)
        weights = {"weights": replace(row, dtype="float32")} if has_weights else {}
        return dict.fromkeys(names, row) | weights


def packing_problems(
    field: str, packing: PackingMode, mask_documents: bool, curriculum: Curriculum | None
) -> Iterator[Problem]:
    """Yields what contradicts the packing of a store; `field` is its path in the config."""
    if packing != "concat" and not mask_documents:
        message, fix = "packed documents need document masks", "use mask_documents=true"
        yield Problem(fields=(field, "mask_documents"), message=message, fix=fix)
    if curriculum is not None and packing == "concat":
        message, fix = "consecutive tokens make rows of one length", f"use {field}=best_fit_by_length"
        yield Problem(fields=("curriculum", field), message=message, fix=fix)


@dataclass(frozen=True, kw_only=True)
class TokenData(StoreData, TokenRows):
    """Config of training on a token store.

    Attributes:
        seq_len: number of targets in a row of a batch.
        packing: what a row holds: consecutive tokens (`concat`), or whole documents that the recipe has packed.
        curriculum: reads short rows first in the first epochs; None shuffles all epochs.
        mask_documents: whether attention, positions and loss treat each document of a row on its own.
    """

    seq_len: PositiveInt = 1024
    packing: PackingMode = "concat"
    curriculum: Curriculum | None = None
    mask_documents: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields fields that contradict each other; `open` compares them with the store."""
        return packing_problems("packing", self.packing, self.mask_documents, self.curriculum)

    @override
    def open(self, *, section: str = "data", hint: str = PREPARE) -> "TokenDataset":
        """Opens the store like `DataConfig.open`; `section` is the path of this config in the run, for messages."""
        lenient = self.on_damage == "skip"
        store = TokenStore.open(
            self.store, self.version, section=section, hint=hint, allow_missing_blocks=lenient, kind="text"
        )
        if store.manifest.masked and not self.mask_documents:
            raise ConfigError(
                f"data.mask_documents=false: {store} has a mask of the tokens that count in the loss; "
                "use data.mask_documents=true"
            )
        if self.packing == "concat":
            open_split = partial(ConcatSamples, self, store)
        else:
            open_split = partial(PackedSamples, self, store, section=section)
        dataset = TokenDataset(store, self.seed, open_split, self.curriculum)
        dataset.train_units = store.manifest.splits["train"].tokens
        return dataset


class TokenSamples(StoreSamples[TokenData, TokenStore]):
    """Samples of a token store: consecutive tokens, or packed rows."""

    @cached_property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes of all targets with weight 1.

        Bits per byte are `loss / log(2) / n_bytes`, with the loss in nats summed over these targets.
        """
        length_V = self._store.tokenizer.byte_lengths()
        batches = validation_batches(self._data, self, global_batch=min(64, len(self)), rows=slice(None))
        return sum(int((length_V[batch["targets"]] * batch["weights"]).sum()) for _, batch in batches)


class ConcatSamples(TokenSamples):
    """Sequences of consecutive tokens, in the order of the text, as `split_inputs_targets` arranges them."""

    def __init__(self, data: TokenData, store: TokenStore, split: Split, limit: int | None = None):
        """Counts the sequences; ConfigError if the split is shorter than one."""
        num_tokens, seq_len = store.manifest.splits[split].tokens, data.seq_len
        count = num_sequences(num_tokens, seq_len)
        if not count:
            fix = f"data.seq_len={num_tokens - 1} or less" if num_tokens > 1 else "a recipe with more validation data"
            raise ConfigError(
                f"data.seq_len={seq_len}: a sequence needs {seq_len + 1} tokens, the {split} split of {store} has "
                f"{num_tokens}; use {fix}, or a larger corpus"
            )
        super().__init__(data, store, split, count, limit)

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        with self._read_time.running():
            tokens_N, mask_N = self._store.read_with_mask(self._split, *self._ranges(ids))
        return self._batch(tokens_N, mask_N, weighted)

    @staticmethod
    def read_together(parts: "Sequence[tuple[ConcatSamples, np.ndarray]]", *, weighted: bool) -> Batch:
        """Reads samples of the same split of several stores, in their order, which have one tokenizer and no masks."""
        first, _ = parts[0]
        with first._read_time.running():
            reads = [(part._store, *part._ranges(ids)) for part, ids in parts]
            tokens_N = read_tokens_together(first._split, reads)
        return first._batch(tokens_N, None, weighted)

    @property
    def is_masked(self) -> bool:
        """Whether the store has a mask of the tokens that count in the loss."""
        return self._store.manifest.masked

    def _ranges(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return ids * self._data.seq_len, np.full(len(ids), self._data.seq_len + 1)

    def _batch(self, tokens_N: np.ndarray, mask_N: np.ndarray | None, weighted: bool) -> Batch:
        width = self._data.seq_len + 1
        batch = split_inputs_targets(
            tokens_N.reshape(-1, width),
            eot_id=self._store.manifest.tokenizer_info.eot_id,
            mask_documents=self._data.mask_documents,
            mask_BW=None if mask_N is None else mask_N.reshape(-1, width),
        )
        if weighted and "weights" not in batch:
            batch["weights"] = np.ones(batch["targets"].shape, np.float32)
        return batch


class PackedSamples(TokenSamples):
    """Rows of whole documents that the recipe has packed, as `packed_batch` arranges them; always with weights."""

    def __init__(self, data: TokenData, store: TokenStore, split: Split, limit: int | None = None, *, section: str):
        """Finds the rows; ConfigError if the store has no such packing, or no row."""
        spec = PackSpec(seq_len=data.seq_len, by_length=data.packing == "best_fit_by_length")
        info = store.manifest.packs.get(f"{split}/{spec.name}")
        if info is None:
            known = sorted({key.split("/")[1] for key in store.manifest.packs}) or ["none"]  # keys are SPLIT/NAME
            missing = f"PackSpec(seq_len={spec.seq_len}{', by_length=True' if spec.by_length else ''})"
            raise ConfigError(
                f"{section}.packing={data.packing}: {store} has no packing {spec.name}, it has "
                f"{', '.join(known)}; add {missing} to the packs of its recipe and prepare it"
            )
        if not info.rows:
            raise ConfigError(
                f"{section}.packing={data.packing}: the {split} split of {store} has no row; use a larger corpus"
            )
        self._folder = f"packs/{spec.name}"
        super().__init__(data, store, split, info.rows, limit)

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        store, split = self._store, self._split
        with self._read_time.running():
            # `rows[i]` is the first segment of row i, and `segments[j]` the first token and the targets of segment j.
            bounds_B2 = store.read_ranges(split, f"{self._folder}/rows", ids, np.full(len(ids), 2)).reshape(-1, 2)
            segments_B = bounds_B2[:, 1] - bounds_B2[:, 0]
            segments_P2 = store.read_ranges(split, f"{self._folder}/segments", bounds_B2[:, 0], segments_B)
            start_P, length_P = segments_P2.T
            tokens_N, mask_N = store.read_with_mask(split, start_P, length_P + 1)
        return packed_batch(tokens_N, length_P, segments_B, seq_len=self._data.seq_len, mask_N=mask_N)


class TokenStoreDataset[S: StoreSamples](StoreDataset[TokenStore, S]):
    """An opened store of text or pairs."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the store."""
        return self.store.tokenizer

    def check(self, model: object) -> None:
        """Raises ConfigError if the model's vocabulary is smaller than the store's."""
        vocab_size = self.store.manifest.tokenizer_info.vocab_size
        model_vocab_size = getattr(model, "vocab_size", vocab_size)  # users' own models may lack the field
        if model_vocab_size < vocab_size:  # JAX raises no error for ids out of bounds of the embedding
            raise ConfigError(
                f"model.vocab_size={model_vocab_size}: {self.store} has {vocab_size} token ids; "
                f"use model.vocab_size={vocab_size} or more"
            )


class TokenDataset(TokenStoreDataset[TokenSamples]):
    """An opened store of text."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields training samples as text, cut to `chars` each."""
        return format_token_rows(self.train.read(ids, weighted=False), self.tokenizer, ids, first_row, chars)
