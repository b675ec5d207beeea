"""Formats config values and names for dumps, overrides and errors.

`config.parse.parse` turns a leaf that `format_value` has written back into the same value.
"""

import dataclasses
import difflib
import enum
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from jaxinfra.config.extensible import Extensible, class_name, is_user_class
from jaxinfra.errors import ConfigError
from jaxinfra.storage.credentials import mask_credentials

# Where a word of a CamelCase name starts: `aB`, or the last capital of `ABc`.
_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
# A string of these characters needs no quotes: `runs/base@500`, `gs://bucket/data`.
_PLAIN = re.compile(r"[A-Za-z_/.~][\w./:@+~-]*", re.ASCII)
# A string that is one of these words needs quotes, because without them it would be read as None or a bool.
_RESERVED = frozenset({"none", "null", "true", "false"})
_SHOWN_CHARACTERS = 60  # of a value in an error, so that the error stays one line
_MAX_PRINTED_BITS = 14_000  # Python refuses to print ints of more than 4300 digits in base 10


def snake_case(cls: type | str) -> str:
    """Returns the name of a class in overrides: `cosine_decay` for `CosineDecay` (the class or this text)."""
    return _WORD_START.sub("_", cls if isinstance(cls, str) else cls.__name__).lower()


def join(path: str, name: str | int) -> str:
    """Returns the dotted path of the part `name` of the node at `path`; the path of the root is ""."""
    return f"{path}.{name}" if path else str(name)


def without_indices(path: str) -> str:
    """Returns a path without its indices into tuples: `layers.window` for `layers.0.window`."""
    return ".".join(name for name in path.split(".") if not name.isdigit())


def format_value(value: object) -> str:
    """Returns a value as text for an override; for a config object, the name of its class."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, str):
        return value if _is_plain(value) else repr(value)
    if isinstance(value, tuple):
        inner = ", ".join(map(format_value, value))
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        has_import_path = isinstance(value, Extensible) and is_user_class(type(value))  # builtins have short names
        return class_name(type(value)) if has_import_path else snake_case(type(value))
    if isinstance(value, int) and value.bit_length() > _MAX_PRINTED_BITS:
        return hex(value)
    return repr(value)


def show(value: object) -> str:
    """Returns the text of any value for an error message: one short line."""
    return shorten(format_value(value))


def shorten(text: str) -> str:
    """Returns one short line of a text, without credentials."""
    text = mask_credentials(" ".join(text.split()))
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Puts a prefix before the message of a ConfigError that is raised inside."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from error


def same(left: object, right: object) -> bool:
    """Tells whether two leaf values are the same; unlike with `==`, NaN equals NaN, and 1 differs from 1.0 and true."""
    return type(left) is type(right) and format_value(left) == format_value(right)


def one_of(words: Iterable[str]) -> str:
    """Joins words: `a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the candidate most similar to `name`; None if the similarity (see `difflib`) of all is below `cutoff`."""
    matches = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def _is_plain(text: str) -> bool:
    """Tells whether a string needs no quotes to be read as a string."""
    if not _PLAIN.fullmatch(text) or text.lower() in _RESERVED:
        return False
    try:
        float(text)  # nan, inf and Infinity would be read as numbers
    except ValueError:
        return True
    return False
