"""What a worker is given, for stores of every kind, and how it goes through records that may be bad."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from jaxinfra.data.store.manifest import Split
from jaxinfra.errors import DataError
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.prepare.recipes.recipe import Recipe
from jaxinfra.prepare.recipes.validation import OtherStore, explicit, split_of
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record


@dataclass(frozen=True, kw_only=True)
class Job[R: Recipe]:
    """What one worker does at a time: the pieces that it reads, and the number and folder of the part that it makes.

    Attributes:
        validation: whether the pieces are of the recipe's own validation source.
    """

    number: int
    pieces: tuple[Piece, ...]
    recipe: R
    folder: str
    validation: bool = False

    @property
    def read_bytes(self) -> int:
        """Bytes of the source, about."""
        return sum(piece.size_bytes for piece in self.pieces)

    def records(self) -> Iterator[Found | Bad]:
        """The records of all pieces. Raises as `Source.read`."""
        source = explicit(self.recipe.validation) if self.validation else self.recipe.source
        assert source is not None and not isinstance(source, OtherStore)
        return (record for piece in self.pieces for record in source.read(piece))

    def split_of(self, key: str) -> Split:
        """The split of a record."""
        return "heldout" if self.validation else split_of(self.recipe.validation, key)


@dataclass
class Records:
    """Counts records that were read, and lists where each bad one was and what is wrong with it."""

    on_bad: Literal["fail", "skip"]
    count: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def made[T](self, records: Iterable[Found | Bad], make: Callable[[Record], T]) -> Iterator[tuple[Found, T]]:
        """Yields each record that can be used, and what is made of it; DataError for others if none may be skipped."""
        for each in records:
            self.count += 1
            try:
                if isinstance(each, Bad):
                    raise RecordError(each.cause)
                made = make(each.record)
            except RecordError as error:
                if self.on_bad == "fail":
                    raise DataError(
                        f"{each.where}: {error}; mend the record, or leave such ones out by on_bad=skip"
                    ) from None
                self.skipped.append((each.where, str(error)))
            else:
                yield each, made
