"""The interface of a store builder, and its jobs, which skip or refuse bad records."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxinfra.data.store.manifest import Manifest, Split
from jaxinfra.errors import DataError
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.prepare.parts import PartMetadata
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.validation import ByKey, OtherStore, hash_to_unit, validation_source
from jaxinfra.prepare.sources.record import BadRecord, Fields, Records, SourceShard


@dataclass(frozen=True, kw_only=True)
class PrepareJob[R: Recipe]:
    """Makes one part from some shards."""

    number: int  # of the job and its part
    shards: tuple[SourceShard, ...]
    recipe: R
    folder: str  # of the parts
    validation: bool = False  # whether the shards are of the recipe's validation source

    @property
    def read_bytes(self) -> int:
        """Bytes of the source, estimated."""
        return sum(shard.size_bytes for shard in self.shards)

    def process_records[T](
        self, process: Callable[[Fields], T], bad: list[tuple[str, str]], records: Records | None = None
    ) -> Iterator[tuple[Split, str, T]]:
        """Yields the split and the location of each good record, and what `process` returns for it.

        A RecordError of `process` makes a record a bad one. `bad` gets the location and the cause of each; DataError if
        the recipe does not skip them. `records` replace those of the shards. Raises as `Source.read`.
        """
        recipe, validation = self.recipe, self.recipe.validation
        if records is None:
            source = validation_source(validation) if self.validation else recipe.source
            assert source is not None and not isinstance(source, OtherStore)
            records = (record for shard in self.shards for record in source.read(shard))
        for record in records:
            try:
                if isinstance(record, BadRecord):
                    raise RecordError(record.cause)
                processed = process(record.fields)
            except RecordError as error:
                if recipe.on_bad == "fail":
                    fix = "correct the record, or skip bad records with on_bad=skip"
                    raise DataError(f"{record.location}: {error}; {fix}") from None
                bad.append((record.location, str(error)))
            else:
                is_drawn = isinstance(validation, ByKey) and hash_to_unit(record.key) < validation.fraction
                yield "validation" if self.validation or is_drawn else "train", record.location, processed


class StoreBuilder[R: Recipe](ABC):
    """Builds a version of a store."""

    stage: str  # name of the stage that runs the jobs, for progress
    make_part: Callable[[PrepareJob[R]], PartMetadata]  # makes and commits the part of a job; importable by workers
    input_digest: str | None  # of the files that the recipe names; None if it names none

    def setup(self, folder: Path, shards: Sequence[SourceShard]) -> None:
        """Writes what the jobs need beside their parts; `shards` are those of the training source."""
        return

    @abstractmethod
    def estimate_bytes(self, source_bytes: int) -> int:
        """Estimates the disk space of parts and arrays, which exist at the same time."""

    @abstractmethod
    def assemble(self, folder: Path, numbers: Sequence[int], build: Path, source_digest: str) -> Manifest:
        """Writes all files of the version but the manifest, from all parts in order.

        Raises:
            ConfigError: a split is empty.
            DataError: a part is damaged; or a document is in both splits, and the recipe does not allow that.
        """
