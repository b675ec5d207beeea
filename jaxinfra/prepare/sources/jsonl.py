"""Every line of JSONL files is a record: a JSON object."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfra.config import Problem
from jaxinfra.prepare.sources.files import problems_of
from jaxinfra.prepare.sources.lines import line_pieces, read_records, text_of
from jaxinfra.prepare.sources.record import Bad, Found, Piece, Record

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a character beyond U+FFFF


@dataclass(frozen=True, kw_only=True)
class Jsonl:
    """JSON objects, one a line; blank lines are none. `NaN` and `Infinity`, which Python writes, are read as numbers.

    Attributes:
        root: folder or URL that holds the files.
        pattern: which files below the root, as in `pathlib.Path.glob`; .gz and .zst are decompressed.
    """

    root: str = ""
    pattern: str = "**/*.jsonl*"

    def problems(self) -> Iterable[Problem]:
        """Yields what is wrong with the description itself."""
        return problems_of(self.root, self.pattern, "**/*.jsonl")

    def pieces(self, split_bytes: int) -> Sequence[Piece]:
        """Ranges of bytes of the files. Raises as `Source.pieces` does."""
        return line_pieces(self.root, self.pattern, split_bytes)

    def read(self, piece: Piece) -> Iterator[Found | Bad]:
        """Yields the objects of the lines that begin in the piece. Raises as `Source.read` does."""
        return read_records(self.root, piece, lambda line: json_object(line) if line.strip() else None)


def json_object(content: bytes) -> Record:
    """The JSON object that `content` spells in UTF-8.

    Raises:
        ValueError: it spells none, or one that no text can be made of.
    """
    text = text_of(content)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise ValueError("has a number of more than 4300 digits") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"is {_JSON_NAMES.get(type(value), 'a number')}, expected an object")
    if _HALF.search(text) and _has_half(value):
        raise ValueError("spells half a character (an unpaired \\ud800 to \\udfff)")
    return value


_JSON_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


def _has_half(value: Any) -> bool:
    """Whether a text in a JSON value has half of a surrogate pair, which UTF-8 cannot spell."""
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(_has_half(part) for item in value.items() for part in item)
    return isinstance(value, list) and any(_has_half(part) for part in value)
