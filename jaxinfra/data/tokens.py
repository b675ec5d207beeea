"""Training on text: samples of a token store (see `batches`), in contiguous windows or in rows of whole documents."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Literal, Protocol

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count
from jaxinfra.data.batches import validation_batches
from jaxinfra.data.inspect import rows
from jaxinfra.data.interfaces import ArraySpec, Batch
from jaxinfra.data.order import Curriculum
from jaxinfra.data.packing import PackSpec
from jaxinfra.data.sequences import num_sequences, packed_batch, split_inputs_targets
from jaxinfra.data.store.manifest import Split
from jaxinfra.data.store.store import PREPARE, TokenStore
from jaxinfra.data.store_data import StoreData, StoreDataset, StoreSamples
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.errors import ConfigError

PackingMode = Literal["concat", "best_fit", "best_fit_by_length"]


@dataclass(frozen=True, kw_only=True)
class TokenData(StoreData):
    """Training on a token store.

    Attributes:
        seq_len: tokens that a row predicts.
        packing: what a row is: a window of consecutive tokens, or whole documents as the store has packed them.
        curriculum: the order of the first epochs, short rows first; None shuffles all alike.
        mask_documents: whether attention, positions and loss keep the documents of a row apart.
    """

    modality: ClassVar[str] = "token"
    seq_len: Count = 1024
    packing: PackingMode = "concat"
    curriculum: Curriculum | None = None
    mask_documents: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the numbers; the store is looked at by `open`."""
        if self.packing != "concat" and not self.mask_documents:
            yield Problem(
                fields=("packing", "mask_documents"),
                message="rows of whole documents keep them apart",
                fix="use mask_documents=true",
            )
        if self.curriculum is not None and self.packing == "concat":
            yield Problem(
                fields=("curriculum", "packing"),
                message="windows are all of one length",
                fix="use packing=best_fit_by_length",
            )

    @property
    def units_per_sample(self) -> int:
        """Tokens of a sequence."""
        return self.seq_len

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """See `DataConfig`."""
        return {"seq_len": (self.seq_len, "positions")}

    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns inputs and targets `[T]`; with document masks also segments, positions and weights."""
        return token_batch_spec(self.seq_len, documents=self.mask_documents, validation=validation)

    @property
    def pack_spec(self) -> PackSpec:
        """The packing of the store that rows of whole documents are of."""
        return PackSpec(seq_len=self.seq_len, by_length=self.packing == "best_fit_by_length")

    def open(self, *, at: str = "data", hint: str = PREPARE) -> "Text":
        """Opens the store and checks that it suits.

        It fails as `DataConfig` says; `at` is the part of the config that names the store, for messages.
        """
        store = TokenStore.open(self.store, self.version, at=at, hint=hint)
        if store.manifest.kind != "text":
            raise ConfigError(f"{at}.store={self.store}: holds {store.manifest.kind}, not text; name another store")
        if store.manifest.masked and not self.mask_documents:
            raise ConfigError(
                f"data.mask_documents=false: {store} says which tokens are learned; use data.mask_documents=true"
            )
        windows = self.packing == "concat"
        samples = partial(ConcatSamples, self, store) if windows else partial(PackedSamples, self, store, at=at)
        opened = Text(store, self.seed, samples, self.curriculum)
        opened.train_units = store.manifest.splits["train"].tokens
        return opened


def token_batch_spec(seq_len: int, *, documents: bool, validation: bool) -> dict[str, ArraySpec]:
    """Returns the arrays of a batch of rows of tokens; `documents` keeps those of a row apart."""
    names = ("inputs", "targets", "segments", "positions") if documents else ("inputs", "targets")
    row = ArraySpec(shape=(seq_len,), dtype="int32", axes=("sequence",))
    weights = {"weights": replace(row, dtype="float32")} if documents or validation else {}
    return dict.fromkeys(names, row) | weights


class TokenSamples(StoreSamples[TokenData, TokenStore], ABC):
    """Samples of a split: what windows and packed rows have in common."""

    @abstractmethod
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Samples of these numbers; see `Samples`."""

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of text that the targets with a weight of 1 stand for.

        With the summed loss of those targets in nats, bits per byte are `loss / log(2) / n_bytes`.
        """
        length_V = self._store.tokenizer.byte_lengths()
        batches = validation_batches(self._data, self, global_batch=min(64, len(self)), rows=slice(None))
        return sum(int((length_V[batch["targets"]] * batch["weights"]).sum()) for _, batch in batches)


class ConcatSamples(TokenSamples):
    """The windows of a split, in the order of the text: `Samples`, each the mapping of `split_inputs_targets`."""

    def __init__(self, data: TokenData, store: TokenStore, split: Split, at_most: int | None = None):
        """Counts them, the first `at_most` of them; reads none yet. ConfigError where there is not even one."""
        tokens, seq_len = store.manifest.splits[split].tokens, data.seq_len
        windows = num_sequences(tokens, seq_len)
        if not windows:
            fix = f"data.seq_len={tokens - 1} or less" if tokens > 1 else "a recipe with more validation data"
            raise ConfigError(
                f"data.seq_len={seq_len}: a window needs {seq_len + 1} tokens, "
                f"the {split} split of {store} has {tokens}; use {fix}, or a larger corpus"
            )
        super().__init__(data, store, split, windows, at_most)

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Inputs and targets, and what keeps documents apart."""
        data, store = self._data, self._store
        starts, length = ids * data.seq_len, data.seq_len + 1
        with self._reading.running():
            window_BW = store.read(self._split, starts, length)
            mask_BW = store.read_mask(self._split, starts, length)
        eot_id = store.manifest.tokenizer_info.eot_id
        batch = split_inputs_targets(window_BW, eot_id=eot_id, mask_documents=data.mask_documents, mask_BW=mask_BW)
        if weighted and "weights" not in batch:
            batch["weights"] = np.ones(batch["targets"].shape, np.float32)
        return batch


class PackedSamples(TokenSamples):
    """The rows of whole documents that the store has packed: `Samples`, each the mapping of `packed_batch`."""

    def __init__(self, data: TokenData, store: TokenStore, split: Split, at_most: int | None = None, *, at: str):
        """Counts the rows; ConfigError if the store has no such packing. `at` is as in `TokenData.open`."""
        name = data.pack_spec.name
        info = store.manifest.packs.get(f"{split}/{name}")
        if info is None:
            known = sorted({key.split("/")[1] for key in store.manifest.packs}) or ["none"]
            wanted = f"PackSpec(seq_len={data.seq_len}{', by_length=True' if data.pack_spec.by_length else ''})"
            raise ConfigError(
                f"{at}.packing={data.packing}: {store} has no rows of {data.seq_len} ({name}), it has "
                f"{', '.join(known)}; add {wanted} to the packs of its recipe and prepare it"
            )
        if not info.rows:
            raise ConfigError(
                f"{at}.packing={data.packing}: the {split} split of {store} has no row; use a larger corpus"
            )
        self._name = f"packs/{name}"
        super().__init__(data, store, split, info.rows, at_most)

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Inputs, targets, and what keeps documents apart; always with weights."""
        store, split = self._store, self._split
        with self._reading.running():
            borders = store.read_ranges(split, f"{self._name}/rows", ids, np.full(len(ids), 2))
            first_B, end_B = borders.reshape(-1, 2).T
            start_P, length_P = store.read_ranges(split, f"{self._name}/segments", first_B, end_B - first_B).T
            tokens_N, mask_N = store.read_segments(split, start_P, length_P + 1)
        return packed_batch(tokens_N, length_P, end_B - first_B, seq_len=self._data.seq_len, mask_N=mask_N)


class Vocabulary(Protocol):
    """Says how large the vocabulary of a model is, to compare with that of a store."""

    @property
    def vocab_size(self) -> int:
        """Words that it has an embedding for."""
        ...


def check_vocabulary(store: TokenStore, model: Vocabulary) -> None:
    """Raises ConfigError for a model whose vocabulary is smaller: ids beyond its embedding would be read as garbage."""
    words = store.manifest.tokenizer_info.vocab_size
    if words > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={model.vocab_size}: the store {store} has {words} words; "
            f"use model.vocab_size={words} or more"
        )


class Text(StoreDataset[TokenStore, TokenSamples]):
    """An open token store: `Dataset`."""

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Training samples in lines for people; see `Dataset`."""
        return rows(self.train.read(ids, weighted=False), self.store.tokenizer, ids, first_row, chars)

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens."""
        return self.store.tokenizer

    def check(self, model: Vocabulary) -> None:
        """Refuses a model with a smaller vocabulary than the store; see `check_vocabulary`."""
        check_vocabulary(self.store, model)
