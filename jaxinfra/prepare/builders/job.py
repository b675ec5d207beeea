"""What a worker is given, for stores of every kind, and how it goes through records that may be bad."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jaxinfra.data.store.manifest import Split
from jaxinfra.errors import DataError
from jaxinfra.prepare.documents.document import RecordError
from jaxinfra.prepare.recipes import Recipe
from jaxinfra.prepare.recipes.validation import ByKey, OtherStore, draw, explicit
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record


@dataclass(frozen=True, kw_only=True)
class Job[R: Recipe]:
    """What one worker does at a time: the pieces that it reads, and the number and folder of the part that it makes.

    `validation` says whether the pieces are of the recipe's own validation source.
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

    def made[T](
        self, make: Callable[[Record], T], bad: list[tuple[str, str]], records: Iterable[Found | Bad] | None = None
    ) -> Iterator[tuple[Split, str, T]]:
        """Yields the split of each record that can be used, where it is, and what is made of it.

        Records are those of all pieces, or others that are given. Where each bad one was and what is wrong with it is
        added to `bad`; a DataError if none may be skipped. Raises as `Source.read`.
        """
        recipe, by = self.recipe, self.recipe.validation
        if records is None:
            source = explicit(by) if self.validation else recipe.source
            assert source is not None and not isinstance(source, OtherStore)
            records = (record for piece in self.pieces for record in source.read(piece))
        for each in records:
            try:
                if isinstance(each, Bad):
                    raise RecordError(each.cause)
                made = make(each.record)
            except RecordError as error:
                if recipe.on_bad == "fail":
                    fix = "mend the record, or leave such ones out by on_bad=skip"
                    raise DataError(f"{each.where}: {error}; {fix}") from None
                bad.append((each.where, str(error)))
            else:
                validation = self.validation or (isinstance(by, ByKey) and draw(each.key) < by.fraction)
                yield "validation" if validation else "train", each.where, made
