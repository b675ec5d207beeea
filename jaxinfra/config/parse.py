"""Parses the text of an override, as the annotation of its field says.

An int is `1_000` or `4e3`, a float what Python's `float` reads, a bool `true` or `false`, None `none` or `null`, a
string bare or quoted, an enum member its name or value, a tuple `(1, 2)`, `[1, 2]` or `1,2`. If a text fits several
types of a union, the narrowest one wins; `str` comes last.
"""

import ast
import enum
import re
import types
from decimal import Decimal
from typing import Literal, get_args, get_origin

from jaxinfra.config.schema import MISMATCH, is_config, is_open, item_annotations, union_members

_INT = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d+)?[eE]\+?\d{1,2}", re.ASCII)
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|.""", re.DOTALL)
_CLOSING = {"(": ")", "[": "]"}
_NARROWEST_FIRST = (types.NoneType, Literal, enum.EnumType, bool, int, float, tuple, str)


def parse(annotation: object, text: str) -> object:
    """Returns the leaf that `text` stands for, or `MISMATCH`."""
    options = [option for option in union_members(annotation) if not is_config(option) and not is_open(option)]
    only_tuple = all(get_origin(option) is tuple or option is types.NoneType for option in union_members(annotation))
    for member in sorted(options, key=_narrowness_rank):
        if get_origin(member) is tuple:
            value = _parse_tuple(member, text, bare=only_tuple)
        elif member is int and float in options:  # `4e3` is then a float
            value = int(text) if _INT.fullmatch(text) else MISMATCH
        else:
            value = _parse_scalar(member, text)
        if value is not MISMATCH:
            return value
    return MISMATCH


def unquote(text: str) -> object:
    """Returns the string that `text` stands for, bare or quoted; `MISMATCH` if a quote is not closed."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return MISMATCH
    return value if isinstance(value, str) else MISMATCH


def _narrowness_rank(member: object) -> int:
    kind = enum.EnumType if isinstance(member, enum.EnumType) else get_origin(member) or member
    return _NARROWEST_FIRST.index(kind)


def _parse_scalar(member: object, text: str) -> object:
    if get_origin(member) is Literal:
        return next((arg for arg in get_args(member) if _stands_for(text, arg)), MISMATCH)
    if member is types.NoneType:
        return None if text.lower() in ("none", "null") else MISMATCH
    if member is bool:
        return {"true": True, "false": False}.get(text.lower(), MISMATCH)
    if member is int:
        return _parse_int(text)
    if member is float:
        try:
            return float(text)
        except ValueError:
            return MISMATCH
    string = unquote(text)
    if isinstance(member, type) and issubclass(member, enum.Enum):
        by_value = (each for each in member if str(each.value) == string)
        return member.__members__.get(str(string), next(by_value, MISMATCH))
    return string


def _stands_for(text: str, value: object) -> bool:
    """Tells whether `text`, parsed as the type of `value`, is `value`."""
    parsed = _parse_scalar(type(value), text)
    return type(parsed) is type(value) and parsed == value  # True == 1


def _parse_int(text: str) -> object:
    if not (_INT.fullmatch(text) or _SCIENTIFIC.fullmatch(text)):
        return MISMATCH
    value = Decimal(text)  # exact, and reads underscores
    return int(value) if value == int(value) else MISMATCH


def _parse_tuple(member: object, text: str, *, bare: bool) -> object:
    """Parses a tuple; `bare` allows one without brackets. In a union with str, `a,b` is a string."""
    parts = _split(text[1:-1]) if text and text[-1] == _CLOSING.get(text[0]) else None
    if parts is None and bare and text:
        parts = _split(text)
    if parts is None or (items := item_annotations(member, len(parts))) is None:
        return MISMATCH
    values = tuple(parse(item, part) for item, part in zip(items, parts, strict=True))
    return MISMATCH if MISMATCH in values else values


def _split(text: str) -> list[str] | None:
    """Splits at the commas outside quotes and brackets; None if brackets do not match or an item is empty."""
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
