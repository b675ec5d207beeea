"""Parses the text of an override into a value that fits the annotation of its field.

An int is `1_000` or `4e3`, a float what Python's `float` reads, a bool `true` or `false`, None `none` or `null`, a
string bare or quoted, an enum member its name or value, a tuple `(1, 2)`, `[1, 2]` or `1,2`. If a text fits several
types of a union, the narrowest one wins; `str` comes last.
"""

import ast
import enum
import math
import re
import types
from collections.abc import Iterator
from decimal import Decimal
from typing import get_origin

from jaxinfra.config.schema import MISMATCH, item_annotations, match, union_members

_INT = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d+)?[eE]\+?\d{1,2}", re.ASCII)  # `4e3`; two digits keep ints small
# A quoted string, or one character.
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|.""", re.DOTALL)
_CLOSING = {"(": ")", "[": "]"}
_CONSTANTS = {"none": None, "null": None, "true": True, "false": False}


def parse(annotation: object, text: str) -> object:
    """Returns the leaf that `text` stands for, or `MISMATCH`."""
    for value in _readings(annotation, text):
        if (matched := match(annotation, value)) is not MISMATCH:
            return matched
    return MISMATCH


def _readings(annotation: object, text: str) -> Iterator[object]:
    """Yields the values that `text` may stand for, of the narrowest type first; `MISMATCH` where it stands for none."""
    options, string = union_members(annotation), unquote(text)
    yield _CONSTANTS.get(text.lower(), MISMATCH)
    for option in options:
        if isinstance(option, type) and issubclass(option, enum.Enum):
            by_name = {str(member.value): member for member in option} | option.__members__
            yield by_name.get(str(string), MISMATCH)
    yield _read_int(text, _INT)
    yield _read_float(text)
    yield _read_int(text, _SCIENTIFIC)  # after the float, as `4e3` in `int | float` is a float
    # In a union with str, `a,b` is a string.
    bare = all(get_origin(option) is tuple or option is types.NoneType for option in options)
    yield _read_tuple(annotation, text, bare=bare)
    yield string


def unquote(text: str) -> object:
    """Returns the string that `text` stands for, bare or quoted; `MISMATCH` if a quote is not closed."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return MISMATCH
    return value if isinstance(value, str) else MISMATCH


def _read_int(text: str, form: re.Pattern[str]) -> object:
    """Returns the int that a text of this form stands for; `MISMATCH` for another form, or a fraction like `1.25e1`."""
    if not form.fullmatch(text):
        return MISMATCH
    value = Decimal(text)  # exact, and reads underscores
    return int(value) if value == int(value) else MISMATCH


def _read_float(text: str) -> object:
    """Returns the float that a text stands for; `MISMATCH` for other texts, and for numbers that are too large."""
    try:
        value = float(text)
    except ValueError:
        return MISMATCH
    is_too_large = math.isinf(value) and "inf" not in text.lower()  # `1e400`
    return MISMATCH if is_too_large else value


def _read_tuple(annotation: object, text: str, *, bare: bool) -> object:
    """Returns a tuple whose items may be `MISMATCH`; `bare` allows one without brackets."""
    has_brackets = bool(text) and text[-1] == _CLOSING.get(text[0])
    parts = _split(text[1:-1]) if has_brackets else None
    if parts is None and bare and text:  # also for `(1, 2), (3, 4)`, whose first bracket does not match the last
        parts = _split(text)
    if parts is None or (items := item_annotations(annotation, len(parts))) is None:
        return MISMATCH
    return tuple(parse(item, part) for item, part in zip(items, parts, strict=True))


def _split(text: str) -> list[str] | None:
    """Splits `a, (b, c)` into `a` and `(b, c)`; None if brackets do not match or an item is empty."""
    parts, open_brackets = [""], []
    for token in _TOKEN.findall(text):
        if token in _CLOSING:
            open_brackets.append(token)
        elif token in _CLOSING.values() and (not open_brackets or _CLOSING[open_brackets.pop()] != token):
            return None
        if token == "," and not open_brackets:
            parts.append("")
        else:
            parts[-1] += token
    parts = [part.strip() for part in parts]
    if not parts[-1]:
        parts.pop()
    return None if open_brackets or not all(parts) else parts
