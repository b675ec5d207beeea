"""What becomes of a record: a document, in spans of text that are tokenized one by one.

A form says how. Whether a span is learned, and whether it may spell special tokens, is decided here and nowhere else:
text that came from a record never spells one.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, override

from jaxinfra.config.limits import NonEmpty
from jaxinfra.prepare.sources.record import Record

_NAMED = 20  # fields that a message lists


class RecordError(Exception):
    """A record does not have what its form asks for; the text says what."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A piece of the text of a document.

    It is `learned` if its tokens are targets of the loss, and may spell special tokens if it is `control`: of a
    template, not of a record.
    """

    text: str
    learned: bool = True
    control: bool = False


Document = Sequence[Span]


class Form(ABC):
    """How records become documents. Every method raises a ConfigError if a file that the form names cannot be used.

    Attributes:
        masked: whether its documents have parts that are not learned.
        group: documents that every record gives: 1, or 2 for a chosen and a rejected answer.
    """

    masked: ClassVar[bool] = True
    group: ClassVar[int] = 1

    def identity(self) -> str | None:
        """Returns what changes when a file that the form names does, which is read anew; None where it names none."""
        return None

    def markers(self) -> Sequence[str]:
        """Returns the special tokens that its template writes: of a file those that it uses by name, as bos_token."""
        return ()

    @abstractmethod
    def documents(self, record: Record) -> Sequence[Document]:
        """Makes the `group` documents of a record; a RecordError says what it lacks, or why a template refuses it."""


@dataclass(frozen=True, kw_only=True)
class Text(Form):
    """The `field` of this name is the document, all of it learned."""

    masked = False
    field: NonEmpty = "text"

    @override
    def documents(self, record: Record) -> Sequence[Document]:
        return [[Span(text=as_text(value_of(record, self.field), self.field))]]


def value_of(record: Record, field: str) -> Any:
    """Returns the value of a field, or raises a RecordError that says which fields there are."""
    if field not in record:
        there = [" ".join(str(name).split()) for name in islice(record, _NAMED)]
        raise RecordError(f"no field {field}; it has {', '.join(there) or 'none'}{' ...' * (len(record) > _NAMED)}")
    return record[field]


def as_text(value: Any, what: str) -> str:
    """Returns the value, or raises a RecordError: it is no text, or JSON spells one in it that UTF-8 cannot."""
    if not isinstance(value, str):
        raise RecordError(f"{what} is {type(value).__name__}, expected a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{what} has half a surrogate pair at character {error.start}: no valid Unicode") from None
    return value
