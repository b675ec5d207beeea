"""What a recipe does with records that cannot be used: `on_bad`."""

from dataclasses import dataclass, field
from typing import Literal

from jaxinfra.errors import DataError


@dataclass
class BadRecords:
    """Records that were left out.

    Attributes:
        on_bad: of the recipe.
        found: where each was, and what is wrong with it.
    """

    on_bad: Literal["fail", "skip"]
    found: list[tuple[str, str]] = field(default_factory=list)

    def add(self, where: str, cause: str) -> None:
        """Leaves a record out.

        Raises:
            DataError: the recipe leaves none out.
        """
        if self.on_bad == "fail":
            raise DataError(f"{where}: {cause}; mend the record, or leave such ones out by on_bad=skip")
        self.found.append((where, cause))
