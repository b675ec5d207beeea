"""Text from several token stores at once, in exact shares that may change at given steps (see `mixing`).

Shape suffix: B samples of a batch.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Annotated, Self, override

import numpy as np

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import NonEmptyStr, PositiveInt
from jaxinfra.data import buffers
from jaxinfra.data.interfaces import Batch, OnDamage, Samples
from jaxinfra.data.mixing import MixStage, OrderedDataset, stage_problems
from jaxinfra.data.order import Curriculum
from jaxinfra.data.store.manifest import digest_of
from jaxinfra.data.store.store import PREPARE
from jaxinfra.data.store_data import resolve_version
from jaxinfra.data.tokenizer import Tokenizer
from jaxinfra.data.tokens import (
    ConcatSamples,
    PackingMode,
    TokenData,
    TokenDataset,
    TokenRows,
    TokenSamples,
    packing_problems,
)
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

    # Where the data is does not change the results; a run records the fingerprints of the stores' contents.
    store: Annotated[NonEmptyStr, NOT_FINGERPRINTED]
    version: Annotated[str | None, NOT_FINGERPRINTED] = None
    recipe: Annotated[str | None, NOT_FINGERPRINTED] = None
    packing: PackingMode = "concat"


@dataclass(frozen=True, kw_only=True)
class Mixture(TokenRows):
    """Config of training on a mixture of token stores.

    Attributes:
        sources: the stores. A new one at the end changes how often the others are read, but not their order.
        stages: the weights of the sources, which may change at given steps; () weighs each source by its size.
        seq_len: number of targets in a row of a batch.
        curriculum: reads short rows first in the first epochs; None shuffles all epochs.
        seed: seed of the order of samples.
        mask_documents: whether attention, positions and loss treat each document of a row on its own.
        on_damage: whether a damaged block ends the run or its samples are left out, as in `TokenData`.
    """

    sources: tuple[MixSource, ...]
    stages: tuple[MixStage, ...] = ()
    seq_len: PositiveInt = 1024
    curriculum: Curriculum | None = None
    seed: int = 0
    prefetch_bytes: Annotated[PositiveInt, NOT_FINGERPRINTED] = 2**26
    threads: Annotated[PositiveInt, NOT_FINGERPRINTED] = 6
    mask_documents: bool = True
    on_damage: Annotated[OnDamage, NOT_FINGERPRINTED] = "stop"

    def problems(self) -> Iterable[Problem]:
        """Yields fields that contradict each other; `open` compares them with the stores."""
        if not self.sources:
            yield Problem(fields=("sources",), message="a mixture needs a source", fix="name at least one store")
        for i, source in enumerate(self.sources):
            yield from packing_problems(f"sources.{i}.packing", source.packing, self.mask_documents, self.curriculum)
        if self.stages:
            yield from stage_problems(self.stages, num_sources=len(self.sources))

    @property
    def source_configs(self) -> Sequence[TokenData]:
        """Each source as the config of a run on it alone."""
        # All other fields, such as `seq_len`, are fields of `TokenData`, too.
        shared = {name: value for name, value in vars(self).items() if name not in ("sources", "stages")}
        return [TokenData(**vars(source), **shared) for source in self.sources]

    @override
    def with_versions(self, versions: Sequence[str]) -> Self:
        # Sources that were added after the versions were recorded have none; they keep their own.
        pairs = zip_longest(self.sources, versions[: len(self.sources)])
        resolved = (replace(source, version=resolve_version(source.version, known)) for source, known in pairs)
        return replace(self, sources=tuple(resolved))

    @property
    @override
    def recipes(self) -> Mapping[str, str]:
        return {source.store: source.recipe for source in self.sources if source.recipe is not None}

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
        source_B = self.source_of(ids)
        batch: Batch = {}

        def add(rows: np.ndarray, found: Batch) -> None:
            for name, array in found.items():
                if name not in batch:
                    # Unlike `np.empty`, it reuses the memory of earlier batches.
                    batch[name] = buffers.empty((len(ids), *array.shape[1:]), array.dtype)
                batch[name][rows] = array

        together = list[tuple[np.ndarray, ConcatSamples, np.ndarray]]()
        for source in np.unique(source_B):
            part, rows = self._parts[source], np.flatnonzero(source_B == source)
            own = ids[rows] - self.offsets[source]
            if isinstance(part, ConcatSamples) and not part.is_masked:
                together.append((rows, part, own))
            else:
                add(rows, part.read(own, weighted=weighted))
        if together:
            found = ConcatSamples.read_together([(part, own) for _, part, own in together], weighted=weighted)
            add(np.concatenate([rows for rows, _, _ in together]), found)
        return batch

    def source_of(self, ids: np.ndarray) -> np.ndarray:
        """Returns the number of the store of each sample: with offsets [0, 60, 260], samples 59 and 60 give 0 and 1."""
        return np.searchsorted(self.offsets, ids, side="right") - 1

    @cached_property
    def n_bytes(self) -> int:
        """Number of UTF-8 bytes of all targets with weight 1."""
        return sum(part.n_bytes for part in self._parts)


class MixtureDataset(OrderedDataset):
    """An opened mixture of token stores."""

    def __init__(self, data: Mixture, parts: Sequence[TokenDataset]):
        self._parts = parts
        self.name = " + ".join(part.name for part in parts)
        self.versions: Sequence[str] = [part.fingerprint for part in parts]
        self.fingerprint = digest_of(self.versions)
        self.train = MixtureSamples([part.train for part in parts])
        self.train_units = sum(part.train_units for part in parts)  # tokens
        self.baselines: Mapping[str, Mapping[str, float]] = {}  # losses of simple models hold only for one store
        names, lengths = [part.name for part in parts], [len(part.train) for part in parts]
        super().__init__(names, lengths, seed=data.seed, stages=data.stages, curriculum=data.curriculum)

    def validation(self, limit: int | None = None) -> MixtureSamples:
        """Returns all validation samples, or the first `limit`, with equal shares from every store."""
        if limit is None:
            return MixtureSamples([part.validation() for part in self._parts])
        share, extra = divmod(limit, len(self._parts))  # 4 samples of 3 stores: 2, 1 and 1; at least 1 of each
        limits = [max(1, share + 1 if i < extra else share) for i in range(len(self._parts))]
        return MixtureSamples([part.validation(own) for part, own in zip(self._parts, limits, strict=True)])

    def format_rows(self, ids: np.ndarray, first_row: int, chars: int) -> Iterator[str]:
        """Yields the store of each training sample, and the sample as text, cut to `chars`."""
        for row, (sample, source) in enumerate(zip(ids, self.train.source_of(ids), strict=True), first_row):
            yield f"of {self._parts[source].name}"
            yield from self._parts[source].format_rows(sample[None] - self.train.offsets[source], row, chars)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all stores."""
        return self._parts[0].tokenizer

    def check(self, model: object) -> None:
        """Raises ConfigError if the model's vocabulary is smaller than a store's."""
        for part in self._parts:
            part.check(model)
