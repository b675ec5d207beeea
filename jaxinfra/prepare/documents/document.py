"""Documents, and the formats that turn records into them.

A document is a list of text spans, and the format decides which of them count in the loss. Only text that a template
writes is tokenized with special tokens; in the text of a record they stay ordinary text.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar, override

from jaxinfra.config.limits import NonEmptyStr
from jaxinfra.data.store.manifest import Kind
from jaxinfra.prepare.sources.record import Fields

_MAX_NAMES = 20  # field names in a message


class RecordError(Exception):
    """A record does not have what its format needs."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Text of a document."""

    text: str
    in_loss: int = True  # mask of its tokens: whether they are targets of the loss, and of which (`data.labeled`)
    from_template: bool = False  # whether a template wrote it, so that it is tokenized with special tokens


Document = Sequence[Span]


class RecordFormat(ABC):
    """Turns records into documents. Every method raises ConfigError if a file that the format names cannot be used."""

    has_loss_mask: ClassVar[bool] = True  # whether its documents have spans that do not count in the loss
    kind: ClassVar[Kind] = "text"  # of the store
    documents_per_record: ClassVar[int] = 1  # 2 for a chosen and a rejected answer

    def template_digest(self) -> str | None:
        """Reads the template file that the format names and returns its digest; None without such a file."""
        return None

    def required_special_tokens(self) -> Sequence[str]:
        """Returns the special tokens that the template writes; for a file, only those used by name (bos_token)."""
        return ()

    @abstractmethod
    def to_documents(self, record: Fields) -> Sequence[Document]:
        """Makes `documents_per_record` documents; RecordError if a field is missing or the template refuses."""


@dataclass(frozen=True, kw_only=True)
class Text(RecordFormat):
    """Takes one field of the record as the document; all of it counts in the loss.

    Attributes:
        field: field of the text.
    """

    has_loss_mask = False
    field: NonEmptyStr = "text"

    @override
    def to_documents(self, record: Fields) -> Sequence[Document]:
        return [[Span(text=require_str(get_field(record, self.field), self.field))]]


def get_field(record: Fields, field: str) -> object:
    """Returns the value of a field; RecordError, with the names of the fields, if the record lacks it."""
    if field not in record:
        names = [" ".join(str(name).split()) for name in islice(record, _MAX_NAMES)]  # keeps the message on one line
        more = " ..." if len(record) > _MAX_NAMES else ""
        raise RecordError(f"no field {field}; it has {', '.join(names) or 'none'}{more}")
    return record[field]


def require_str(value: object, name: str) -> str:
    """Returns `value`; RecordError if it is not a string, or has unpaired surrogates, which UTF-8 cannot encode."""
    if not isinstance(value, str):
        raise RecordError(f"{name} is {type(value).__name__}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{name} has an unpaired surrogate at character {error.start}") from None
    return value
