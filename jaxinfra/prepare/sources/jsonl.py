"""Every line of JSONL files is a record: a JSON object."""

import json
import re
from dataclasses import dataclass
from typing import Any, override

from jaxinfra.prepare.sources.lines import LineFiles, text_of
from jaxinfra.prepare.sources.record import Record

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a character beyond U+FFFF
_JSON_NAMES = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True, kw_only=True)
class Jsonl(LineFiles):
    """JSON objects, one a line; blank lines are none. `NaN` and `Infinity` of Python are read as numbers."""

    pattern: str = "**/*.jsonl*"

    @override
    def _record(self, line: bytes) -> Record | None:
        return json_object(line) if line.strip() else None


def json_object(content: bytes) -> Record:
    """Reads a JSON object in UTF-8; a ValueError says that it is none, or one that no text can be made of."""
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


def _has_half(value: Any) -> bool:
    """Tells whether a text in a JSON value has half of a surrogate pair, which UTF-8 cannot spell."""
    if isinstance(value, str):
        return any("\ud800" <= character <= "\udfff" for character in value)
    if isinstance(value, dict):
        return any(_has_half(part) for item in value.items() for part in item)
    return isinstance(value, list) and any(map(_has_half, value))
