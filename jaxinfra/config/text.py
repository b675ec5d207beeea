"""How config values and names are written for a person: on a command line, in a dump, in an error.

It knows nothing of annotations; `parse` reads these texts back. The invariant is that a value written by
`format_value` and given as an override to the field that it came from yields the same value.
"""

import dataclasses
import difflib
import enum
import re
from collections.abc import Iterable
from typing import Any

from jaxinfra.config.extensible import Extensible, class_name, is_users
from jaxinfra.storage.credentials import mask_credentials

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_PLAIN = re.compile(r"[A-Za-z_/.~][\w./:@+~-]*", re.ASCII)
_RESERVED = frozenset({"none", "null", "true", "false"})
_SHOWN_CHARACTERS = 60


def snake_case(cls: type) -> str:
    """Returns the name by which a config class is chosen: `CosineDecay` is `cosine_decay`, `WSD` is `wsd`."""
    return _WORD_START.sub("_", cls.__name__).lower()


def join(path: str, name: str | int) -> str:
    """Returns the dotted path of the part `name` of the node at `path` ("" is the root)."""
    return f"{path}.{name}" if path else str(name)


def is_below(path: str, prefix: str) -> bool:
    """Tells whether `path` is `prefix` or lies inside it."""
    return path == prefix or path.startswith(f"{prefix}.")


def format_value(value: Any) -> str:
    """Writes a config value the way an override spells it; a config object becomes its snake_case name."""
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
        own = isinstance(value, Extensible) and is_users(type(value))
        return class_name(type(value)) if own else snake_case(type(value))
    return repr(value)


def show(value: Any) -> str:
    """Writes any value for an error message: on one line, and short."""
    return shorten(format_value(value))


def shorten(text: str) -> str:
    """Puts a text on one line and cuts it to what a message can carry; credentials are left out."""
    text = mask_credentials(" ".join(text.split()))
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def same(left: Any, right: Any) -> bool:
    """Tells whether two leaf values are written alike; unlike `==`, NaN is NaN, and 1 is not 1.0 or true."""
    return type(left) is type(right) and format_value(left) == format_value(right)


def one_of(words: Iterable[str]) -> str:
    """Joins alternatives: `a`, `a or b`, `a, b or c`."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def nearest(name: str, candidates: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the candidate most like `name`, or None when none is near (ratio of `difflib` >= cutoff)."""
    return next(iter(difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)), None)


def _is_plain(text: str) -> bool:
    """Tells whether a string can be written bare without being taken for another type."""
    if not _PLAIN.fullmatch(text) or text.lower() in _RESERVED:
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
