"""Training on text: the windows of a token store as samples (see `batches`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np

from jaxinfra.config import Problem
from jaxinfra.data.batches import heldout_batches
from jaxinfra.data.contract import Batch, Progress
from jaxinfra.data.corpus import Corpus, Split
from jaxinfra.data.manifest import check_recipe
from jaxinfra.data.prepare import facts, prepare
from jaxinfra.data.store import PREPARE, TokenStore
from jaxinfra.data.windows import split_inputs_targets, window_count
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TokenData:
    """Training on windows of a token store.

    Attributes:
        store: folder of the store; `prepare` makes it.
        corpus: the recipe that the store is made from.
        seq_len: tokens that a row predicts.
        seed: of the order of windows.
        prefetch: host batches that are made ahead.
        threads: threads that make host batches.
        mask_documents: whether attention, positions and loss keep the documents of a window apart.
    """

    unit: ClassVar[str] = "token"
    store: str
    corpus: Corpus = Corpus()
    seq_len: int = 1024
    seed: int = 0
    prefetch: int = 4
    threads: int = 2
    mask_documents: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the numbers; the store is looked at by `open`."""
        if not self.store:
            yield Problem(fields=("store",), message="names no folder", fix="use store=PATH")
        for name in ("seq_len", "prefetch", "threads"):
            if getattr(self, name) < 1:
                yield Problem(fields=(name,), message="must be at least 1", fix=f"use {name}=1 or more")

    @property
    def sample_units(self) -> int:
        """Tokens of a sequence."""
        return self.seq_len

    @property
    def spread(self) -> Mapping[str, tuple[int, str]]:
        """See `DataConfig`."""
        return {"seq_len": (self.seq_len, "positions")}

    def open(self, *, fix: str = PREPARE) -> "Text":
        """Opens the store and checks that it suits.

        Args:
            fix: the command that makes the store, for the error when there is none.

        Raises:
            ConfigError: there is no store, it has another recipe, or it is shorter than one window.
            DataError: it is damaged.
            StorageError: it may not be read.
        """
        store = TokenStore.open(self.store, fix=fix)
        check_recipe(store.manifest, self.corpus, self.store)
        return Text(self, store)

    def prepare(self, progress: Progress) -> Sequence[str]:
        """Makes the store; see `prepare.prepare`."""
        manifest = prepare(self.corpus, self.store, progress)
        return [f"store      {self.store}, fingerprint {manifest.fingerprint}", *facts(manifest)]


class Windows:
    """The windows of a split, in the order of the text: `Samples`, each the mapping of `split_inputs_targets`."""

    def __init__(self, data: TokenData, store: TokenStore, split: Split, at_most: int | None = None):
        """Counts them, the first `at_most` of them; reads none yet.

        Raises:
            ConfigError: there is not even one.
        """
        self._data, self._store = data, store
        self._split: Split = split
        tokens, seq_len = store.manifest.splits[split].tokens, data.seq_len
        windows = window_count(tokens, seq_len)
        if not windows:
            fix = f"data.seq_len={tokens - 1} or less" if tokens > 1 else "another data.corpus.heldout_fraction"
            raise ConfigError(
                f"data.seq_len={seq_len}: a window needs {seq_len + 1} tokens, "
                f"the {split} split of {store.path} has {tokens}; use {fix}, or a larger corpus"
            )
        self._count = windows if at_most is None else min(at_most, windows)

    def __len__(self) -> int:
        return self._count

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Inputs and targets, and what keeps documents apart."""
        data, store = self._data, self._store
        window_BW = store.read(self._split, ids * data.seq_len, data.seq_len + 1)
        batch = split_inputs_targets(window_BW, eot_id=store.manifest.eot_id, mask_documents=data.mask_documents)
        if weighted and "weights" not in batch:
            batch["weights"] = np.ones(batch["targets"].shape, np.float32)
        return batch

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of text that the targets with a weight of 1 stand for.

        With the summed loss of those targets in nats, bits per byte are `loss / log(2) / n_bytes`.
        """
        length_V = self._store.tokenizer.byte_lengths()
        batches = heldout_batches(self._data, self, global_batch=min(64, len(self)), rows=slice(None))
        return sum(int((length_V[batch["targets"]] * batch["weights"]).sum()) for _, batch in batches)


class Vocabulary(Protocol):
    """What must be known of a model to read text."""

    @property
    def vocab_size(self) -> int:
        """Words that it has an embedding for."""
        ...


class Text:
    """An open token store: `OpenData`."""

    def __init__(self, data: TokenData, store: TokenStore):
        """Takes a store whose training split has at least one window.

        Raises:
            ConfigError: it has none.
        """
        self._data, self.store = data, store
        self.name, self.fingerprint = data.store, store.manifest.fingerprint
        self.train = Windows(data, store, "train")
        self.train_units = store.manifest.splits["train"].tokens

    def heldout(self, at_most: int | None = None) -> Windows:
        """The held-out windows.

        Raises:
            ConfigError: the held-out split is shorter than one window.
        """
        return Windows(self._data, self.store, "heldout", at_most)

    def check(self, model: Vocabulary) -> None:
        """Refuses a model whose vocabulary is smaller than the store's.

        Raises:
            ConfigError: it is; ids beyond the model's embedding would be read as garbage.
        """
        words = self.store.manifest.vocab_size
        if words > model.vocab_size:
            raise ConfigError(
                f"model.vocab_size={model.vocab_size}: the store {self.store.path} has {words} tokens; "
                f"use model.vocab_size={words} or more"
            )

    @property
    def baselines(self) -> Mapping[str, Mapping[str, float]]:
        """Bits per byte of a general compressor and of an n-gram, where they were measured."""
        found = self.store.manifest.baselines
        named: dict[str, Any] = {"xz -6": found.xz_bits_per_byte, "token 5-gram": found.ngram_bits_per_byte}
        return {"bits_per_byte": {name: bits for name, bits in named.items() if bits is not None}}
