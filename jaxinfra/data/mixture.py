"""Training on several token stores at once, in exact shares that may change at given steps (see `mixing`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import zip_longest
from typing import Annotated, ClassVar, Self

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import Count, NonEmpty
from jaxinfra.data import buffers
from jaxinfra.data.inspect import rows
from jaxinfra.data.interfaces import ArraySpec, Batch, DataConfig
from jaxinfra.data.mixing import MixStage, MixtureSampler, stage_problems
from jaxinfra.data.order import Curriculum
from jaxinfra.data.store.manifest import digest_of
from jaxinfra.data.store.store import PREPARE
from jaxinfra.data.store_data import resolve_version
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokens import PackingMode, Text, TokenData, TokenSamples, Vocabulary, token_batch_spec
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MixSource:
    """A store of a mixture; its fields are those of `TokenData`."""

    store: Annotated[NonEmpty, NOT_FINGERPRINTED]
    version: Annotated[str | None, NOT_FINGERPRINTED] = None
    recipe: Annotated[str | None, NOT_FINGERPRINTED] = None
    packing: PackingMode = "concat"


@dataclass(frozen=True, kw_only=True)
class Mixture(DataConfig):
    """Training on a mixture of token stores; its other fields are those of `TokenData`, `curriculum` for each source.

    Attributes:
        sources: the stores. One more at the end changes how often the others are read, not in which order.
        stages: the weight of each source, from which step on; () weighs each by its size.
    """

    modality: ClassVar[str] = "token"
    sources: tuple[MixSource, ...]
    stages: tuple[MixStage, ...] = ()
    seq_len: Count = 1024
    curriculum: Curriculum | None = None
    seed: int = 0
    prefetch_bytes: Annotated[Count, NOT_FINGERPRINTED] = 2**26
    threads: Annotated[Count, NOT_FINGERPRINTED] = 6
    mask_documents: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the numbers; the stores are looked at by `open`."""
        if not self.sources:
            yield Problem(fields=("sources",), message="are none", fix="name a store at least")
        for i, each in enumerate(self.parts):
            for problem in each.problems():
                named = {name: f"sources.{i}.{name}" for name in vars(self.sources[i])}
                field, _, value = problem.fix.removeprefix("use ").partition("=")
                fix = f"use {named[field]}={value}" if field in named else problem.fix
                yield replace(problem, fields=tuple(named.get(name, name) for name in problem.fields), fix=fix)
        if self.stages:
            yield from stage_problems(self.stages, sources=len(self.sources))

    @property
    def parts(self) -> Sequence[TokenData]:
        """Each store by itself."""
        return [
            TokenData(
                **vars(source),
                seq_len=self.seq_len,
                curriculum=self.curriculum,
                seed=self.seed,
                prefetch_bytes=self.prefetch_bytes,
                threads=self.threads,
                mask_documents=self.mask_documents,
            )
            for source in self.sources
        ]

    def with_versions(self, versions: Sequence[str]) -> Self:
        """See `DataConfig`."""
        pairs = zip_longest(self.sources, versions[: len(self.sources)])
        return replace(
            self, sources=tuple(replace(each, version=resolve_version(each.version, known)) for each, known in pairs)
        )

    @property
    def recipes(self) -> Mapping[str, str]:
        """See `DataConfig`."""
        return {source.store: source.recipe for source in self.sources if source.recipe is not None}

    @property
    def units_per_sample(self) -> int:
        """Tokens of a sequence."""
        return self.seq_len

    def batch_spec(self, *, validation: bool) -> Mapping[str, ArraySpec]:
        """Returns inputs and targets `[T]`; with document masks also segments, positions and weights."""
        return token_batch_spec(self.seq_len, documents=self.mask_documents, validation=validation)

    @property
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """See `DataConfig`."""
        return {"seq_len": (self.seq_len, "positions")}

    def open(self, *, hint: str = PREPARE) -> "MixtureDataset":
        """Opens every store and checks that they were made by one tokenizer; see `DataConfig`."""
        found = [part.open(at=f"data.sources.{i}", hint=hint) for i, part in enumerate(self.parts)]
        first = found[0].store.manifest.tokenizer_info
        for each in found[1:]:
            words = each.store.manifest.tokenizer_info
            if (words.sha256, words.eot_id) != (first.sha256, first.eot_id):
                raise ConfigError(
                    f"data.sources: {found[0].name} and {each.name} were made by different tokenizers "
                    f"({first.sha256[:12]}, {words.sha256[:12]}); prepare one of them with the tokenizer of the other"
                )
        return MixtureDataset(self, found)


class MixtureSamples:
    """Samples of several stores, numbered through: `Samples`."""

    def __init__(self, parts: Sequence[TokenSamples]):
        self._parts = parts
        self.offsets = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def reading_s(self) -> float:
        """See `Samples`."""
        return sum(part.reading_s for part in self._parts)

    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        """Samples of these numbers, each read from its own store."""
        source = np.searchsorted(self.offsets, ids, side="right") - 1
        batch: Batch = {}
        for number in np.unique(source):
            own = source == number
            for name, array in self._parts[number].read(ids[own] - self.offsets[number], weighted=weighted).items():
                batch.setdefault(name, buffers.empty((len(ids), *array.shape[1:]), array.dtype))[own] = array
        return batch

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of text that the targets with a weight of 1 stand for."""
        return sum(part.n_bytes for part in self._parts)


class MixtureDataset:
    """Open token stores: `Dataset`."""

    def __init__(self, data: Mixture, parts: Sequence[Text]):
        """Takes stores of one tokenizer."""
        self._parts = parts
        self.name = " + ".join(part.name for part in parts)
        self.versions: Sequence[str] = [part.fingerprint for part in parts]
        self.fingerprint = digest_of(self.versions)
        self.train = MixtureSamples([part.train for part in parts])
        self.train_units = sum(part.train_units for part in parts)
        self.baselines: Mapping[str, Mapping[str, float]] = {}  # what was measured is of one store each
        lengths = [len(part.train) for part in parts]
        mixing = partial(MixtureSampler, lengths, data.stages, seed=data.seed, curriculum=data.curriculum)
        self._mixing = lru_cache(maxsize=1)(mixing)

    def sample_ids(self, step: int, global_batch: int) -> np.ndarray:
        """The samples of the global batch of a step, in the order of its rows; see `Dataset`."""
        source, sample = self._mixing(global_batch=global_batch).sample_ids(step)
        return self.train.offsets[source] + sample

    def epochs_at(self, step: int, global_batch: int) -> Iterator[str]:
        """See `Dataset`."""
        for part, count in zip(self._parts, self._mixing(global_batch=global_batch).counts(step), strict=True):
            yield f"{part.name}: {count / len(part.train):.3f} epochs before"

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Training samples in lines for people; see `Dataset`."""
        for at, sample in enumerate(ids):
            source = int(np.searchsorted(self.train.offsets, sample, side="right")) - 1
            yield f"of {self._parts[source].name}"
            batch = self.train.read(sample[None], weighted=False)
            yield from rows(batch, self.tokenizer, sample[None] - self.train.offsets[source], first_row + at, chars)

    def validation(self, at_most: int | None = None) -> MixtureSamples:
        """Returns all validation samples, or the first `at_most`, with equal shares from every store."""
        count = len(self._parts)
        shares = [None if at_most is None else max(1, (at_most + count - 1 - i) // count) for i in range(count)]
        return MixtureSamples([part.validation(share) for part, share in zip(self._parts, shares, strict=True)])

    @property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens of all of them."""
        return self._parts[0].tokenizer

    def check(self, model: Vocabulary) -> None:
        """Refuses a model with a smaller vocabulary than the store; see `check_vocabulary`."""
        for part in self._parts:
            part.check(model)
