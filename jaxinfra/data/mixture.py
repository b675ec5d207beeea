"""Text from several token stores at once, in exact shares that may change at given steps (see `mixing`)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import zip_longest
from typing import Annotated, ClassVar, Self, override

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import NonEmptyStr, PositiveInt
from jaxinfra.data import buffers
from jaxinfra.data.interfaces import ArraySpec, Batch, DataConfig, Samples
from jaxinfra.data.mixing import MixStage, MixtureSampler, stage_problems
from jaxinfra.data.order import Curriculum
from jaxinfra.data.store.manifest import digest_of
from jaxinfra.data.store.store import PREPARE
from jaxinfra.data.store_data import resolve_version
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokens import HasVocabulary, PackingMode, TokenData, TokenDataset, TokenSamples, token_batch_spec
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MixSource:
    """A store of a mixture.

    Attributes:
        store: folder or URL of the store.
        version: fingerprint of the version to read; None reads the newest.
        recipe: config file that prepares the store.
        packing: what a row holds, as in `TokenData`.
    """

    store: Annotated[NonEmptyStr, NOT_FINGERPRINTED]
    version: Annotated[str | None, NOT_FINGERPRINTED] = None
    recipe: Annotated[str | None, NOT_FINGERPRINTED] = None
    packing: PackingMode = "concat"


@dataclass(frozen=True, kw_only=True)
class Mixture(DataConfig):
    """Config of training on a mixture of token stores.

    Attributes:
        sources: the stores. A new one at the end changes how often the others are read, but not their order.
        stages: the weights of the sources, which may change at given steps; () weighs each source by its size.
        seq_len: number of targets in a row of a batch.
        curriculum: reads short rows first in the first epochs; None shuffles all epochs.
        seed: seed of the order of samples.
        mask_documents: whether attention, positions and loss treat each document of a row on its own.
    """

    modality: ClassVar[str] = "token"
    sources: tuple[MixSource, ...]
    stages: tuple[MixStage, ...] = ()
    seq_len: PositiveInt = 1024
    curriculum: Curriculum | None = None
    seed: int = 0
    prefetch_bytes: Annotated[PositiveInt, NOT_FINGERPRINTED] = 2**26
    threads: Annotated[PositiveInt, NOT_FINGERPRINTED] = 6
    mask_documents: bool = True

    def problems(self) -> Iterable[Problem]:
        """Yields fields that contradict each other; `open` compares them with the stores."""
        if not self.sources:
            yield Problem(fields=("sources",), message="a mixture needs a source", fix="name at least one store")
        for i, source in enumerate(self.source_configs):
            # The problem of a source names its own fields, which have a longer path in the mixture.
            path = {name: f"sources.{i}.{name}" for name in vars(self.sources[i])}
            for problem in source.problems():
                field, _, value = problem.fix.removeprefix("use ").partition("=")
                fix = f"use {path[field]}={value}" if field in path else problem.fix
                yield replace(problem, fields=tuple(path.get(name, name) for name in problem.fields), fix=fix)
        if self.stages:
            yield from stage_problems(self.stages, num_sources=len(self.sources))

    @property
    def source_configs(self) -> Sequence[TokenData]:
        """Each source as the config of a run on it alone."""
        shared = {name: value for name, value in vars(self).items() if name not in ("sources", "stages")}
        return [TokenData(**vars(source), **shared) for source in self.sources]

    @override
    def with_versions(self, versions: Sequence[str]) -> Self:
        pairs = zip_longest(self.sources, versions[: len(self.sources)])
        sources = (replace(source, version=resolve_version(source.version, known)) for source, known in pairs)
        return replace(self, sources=tuple(sources))

    @property
    @override
    def recipes(self) -> Mapping[str, str]:
        return {source.store: source.recipe for source in self.sources if source.recipe is not None}

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
        return token_batch_spec(self.seq_len, mask_documents=self.mask_documents, validation=validation)

    @override
    def open(self, *, hint: str = PREPARE) -> "MixtureDataset":
        datasets = [source.open(section=f"data.sources.{i}", hint=hint) for i, source in enumerate(self.source_configs)]
        first = datasets[0].store.manifest.tokenizer_info
        for dataset in datasets[1:]:
            other = dataset.store.manifest.tokenizer_info
            if (other.sha256, other.eot_id) != (first.sha256, first.eot_id):
                raise ConfigError(
                    f"data.sources: {datasets[0].name} and {dataset.name} have different tokenizers "
                    f"({first.sha256[:12]}, {other.sha256[:12]}); prepare one of them with the tokenizer of the other"
                )
        return MixtureDataset(self, datasets)


class MixtureSamples(Samples):
    """Samples of several stores; sample ids count through all stores, one store after the other."""

    def __init__(self, parts: Sequence[TokenSamples]):
        self._parts = parts
        self.offsets = np.cumsum([0, *map(len, parts)])

    @override
    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    @override
    def read_time_s(self) -> float:
        return sum(part.read_time_s for part in self._parts)

    @override
    def read(self, ids: np.ndarray, *, weighted: bool) -> Batch:
        source = np.searchsorted(self.offsets, ids, side="right") - 1
        batch: Batch = {}
        for number in np.unique(source):
            own = source == number
            for name, array in self._parts[number].read(ids[own] - self.offsets[number], weighted=weighted).items():
                batch.setdefault(name, buffers.empty((len(ids), *array.shape[1:]), array.dtype))[own] = array
        return batch

    @cached_property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes of all targets with weight 1."""
        return sum(part.n_bytes for part in self._parts)


class MixtureDataset:
    """An opened mixture of token stores."""

    def __init__(self, data: Mixture, parts: Sequence[TokenDataset]):
        """Takes the datasets of the sources."""
        self._parts = parts
        self.name = " + ".join(part.name for part in parts)
        self.versions: Sequence[str] = [part.fingerprint for part in parts]
        self.fingerprint = digest_of(self.versions)
        self.train = MixtureSamples([part.train for part in parts])
        self.train_units = sum(part.train_units for part in parts)
        self.baselines: Mapping[str, Mapping[str, float]] = {}  # a store's baselines do not hold for a mixture
        lengths = [len(part.train) for part in parts]
        sampler = partial(MixtureSampler, lengths, data.stages, seed=data.seed, curriculum=data.curriculum)
        self._sampler = lru_cache(maxsize=1)(sampler)

    def validation(self, limit: int | None = None) -> MixtureSamples:
        """Returns all validation samples, or the first `limit`, with equal shares from every store."""
        count = len(self._parts)
        # If the limit cannot be divided, the first stores give one sample more; every store gives at least one.
        shares = [None if limit is None else max(1, (limit + count - 1 - i) // count) for i in range(count)]
        return MixtureSamples([part.validation(share) for part, share in zip(self._parts, shares, strict=True)])

    def sample_ids(self, step: int, global_batch: int) -> np.ndarray:
        """Returns the training samples of the global batch of a step, int64[global_batch]."""
        source, sample = self._sampler(global_batch=global_batch).sample_ids(step)
        return self.train.offsets[source] + sample

    def epochs_at(self, step: int, global_batch: int) -> Iterator[str]:
        """Yields a line for each store, with the number of its epochs that were read before a step."""
        for part, count in zip(self._parts, self._sampler(global_batch=global_batch).counts(step), strict=True):
            yield f"{part.name}: {count / len(part.train):.3f} epochs before"

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields the store of each training sample, and the sample as text, cut to `chars`."""
        for row, sample in enumerate(ids, first_row):
            source = int(np.searchsorted(self.train.offsets, sample, side="right")) - 1
            yield f"of {self._parts[source].name}"
            yield from self._parts[source].format_rows(sample[None] - self.train.offsets[source], row, chars)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all stores."""
        return self._parts[0].tokenizer

    def check(self, model: HasVocabulary) -> None:
        """Raises ConfigError if the model's vocabulary is smaller than a store's."""
        for part in self._parts:
            part.check(model)
