"""A base class for what must be closed."""

from abc import ABC, abstractmethod
from typing import Self

from jaxinfra.errors import JaxinfraError


class ClosedOnExit(ABC):
    """A context manager that closes itself; its failure to close does not replace the error that ended the block."""

    @abstractmethod
    def close(self) -> None:
        """Finishes the work and frees resources; raises JaxinfraError if the work failed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except JaxinfraError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
