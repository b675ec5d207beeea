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
    """What one worker does at a time.

    Attributes:
        number: of the part that it makes.
        pieces: what it reads.
        recipe: what the part is for.
        folder: for parts.
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
    """Records that were read, and those of them that cannot be used.

    Attributes:
        on_bad: of the recipe.
        count: of all.
        skipped: where each bad one was, and what is wrong with it.
    """

    on_bad: Literal["fail", "skip"]
    count: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def made[T](self, records: Iterable[Found | Bad], make: Callable[[Record], T]) -> Iterator[tuple[Found, T]]:
        """Yields each record that can be used, and what is made of it.

        Raises:
            DataError: one cannot be used, and the recipe leaves none out.
        """
        for each in records:
            self.count += 1
            if isinstance(each, Bad):
                self._leave_out(each.where, each.cause)
                continue
            try:
                made = make(each.record)
            except RecordError as error:
                self._leave_out(each.where, str(error))
                continue
            yield each, made

    def _leave_out(self, where: str, cause: str) -> None:
        if self.on_bad == "fail":
            raise DataError(f"{where}: {cause}; mend the record, or leave such ones out by on_bad=skip")
        self.skipped.append((where, cause))
