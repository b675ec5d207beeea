"""The interface of a store builder, and its jobs."""

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
    """Describes one job: to make a part from some shards."""

    number: int  # number of the job and of its part
    shards: tuple[SourceShard, ...]
    recipe: R
    validation: bool = False  # whether the shards belong to the validation source of the recipe

    @property
    def read_bytes(self) -> int:
        """Bytes of the source, estimated."""
        return sum(shard.size_bytes for shard in self.shards)

    def read_records(self) -> Records:
        """Yields the records of all shards; raises as `Source.read`."""
        source = validation_source(self.recipe.validation) if self.validation else self.recipe.source
        assert source is not None and not isinstance(source, OtherStore)
        for shard in self.shards:
            yield from source.read(shard)


def process_records[T](
    recipe: Recipe,
    records: Records,
    process: Callable[[Fields], T],
    skipped: list[tuple[str, str]],
    *,
    validation: bool = False,
) -> Iterator[tuple[Split, str, T]]:
    """Yields split, location and the result of `process` for each good record.

    A record is bad if it cannot be read, or `process` raises RecordError. Its location and cause are appended to
    `skipped`; DataError if the recipe does not skip bad records. `validation` puts all records into that split.
    """
    for record in records:
        try:
            if isinstance(record, BadRecord):
                raise RecordError(record.cause)
            processed = process(record.fields)
        except RecordError as error:
            if recipe.on_bad == "fail":
                fix = "correct the record, or skip bad records with on_bad=skip"
                raise DataError(f"{record.location}: {error}; {fix}") from None
            skipped.append((record.location, str(error)))
        else:
            config = recipe.validation
            is_drawn = isinstance(config, ByKey) and hash_to_unit(record.key) < config.fraction
            yield "validation" if validation or is_drawn else "train", record.location, processed


class StoreBuilder[R: Recipe](ABC):
    """Builds a version of a store."""

    stage: str  # name of the stage that runs the jobs, for progress
    make_part: Callable[[Path, PrepareJob[R]], PartMetadata]  # makes and commits the part of a job; workers import it
    input_digest: str | None  # digest of the files that the recipe names, such as a tokenizer; None without such files

    def setup(self, folder: Path, shards: Sequence[SourceShard]) -> None:
        """Writes what the jobs need beside their parts; `shards` belong to the training source."""
        return

    @abstractmethod
    def estimate_bytes(self, source_bytes: int) -> int:
        """Estimates the disk space of parts and arrays, which exist at the same time."""

    @abstractmethod
    def assemble(self, folder: Path, num_parts: int, build: Path, source_digest: str) -> Manifest:
        """Writes all files of the version but the manifest to `build`, from all parts of `folder` in order.

        Raises EmptySplitError if a split has no documents, and DataError if a part is damaged, or a document is in both
        splits and the recipe forbids it.
        """
