"""From the text of an override to a leaf value, guided by the annotation of its field.

The forms: `1_000` and `4e3` for int, anything that `float` reads for float, `true` and `false`, `none` or
`null`, bare or quoted strings, an enum member by name or by value, tuples as `(1, 2)`, `[1, 2]` or `1,2`. Of
several alternatives the narrowest one that fits wins, and `str` comes last.
"""

import ast
import enum
import re
import types
from decimal import Decimal
from typing import Any, Literal, get_args, get_origin

from jaxinfra.config.schema import MISMATCH, is_config, is_open, items_of, members

_INT = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d+)?[eE]\+?\d{1,2}", re.ASCII)
_TOKEN = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|.""", re.DOTALL)
_CLOSING = {"(": ")", "[": "]"}


def parse(annotation: Any, text: str) -> Any:
    """Returns the leaf value that `text` stands for, or `MISMATCH`."""
    options = members(annotation)
    only_tuple = all(get_origin(option) is tuple or option is types.NoneType for option in options)
    for member in sorted(options, key=_breadth):
        if get_origin(member) is tuple:
            value = _parse_tuple(member, text, bare=only_tuple)
        elif member is int and float in options:
            value = int(text) if _INT.fullmatch(text) else MISMATCH
        else:
            value = MISMATCH if is_config(member) or is_open(member) else _parse_scalar(member, text)
        if value is not MISMATCH:
            return value
    return MISMATCH


def unquote(text: str) -> Any:
    """Returns the string that `text` stands for, bare or quoted; `MISMATCH` when a quote is not closed."""
    if text[:1] not in ("'", '"'):
        return text
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return MISMATCH
    return value if isinstance(value, str) else MISMATCH


def _breadth(member: Any) -> int:
    """Orders alternatives from the narrowest to the widest."""
    if get_origin(member) is Literal:
        return 1
    if isinstance(member, enum.EnumType):
        return 2
    return {types.NoneType: 0, bool: 3, int: 4, float: 5, str: 7}.get(member, 6)


def _parse_scalar(member: Any, text: str) -> Any:
    if get_origin(member) is Literal:
        return next((arg for arg in get_args(member) if _spells(text, arg)), MISMATCH)
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
    if member is str:
        return unquote(text)
    name = unquote(text)  # of an enum's member, or its value
    return member.__members__.get(name, next((each for each in member if str(each.value) == name), MISMATCH))


def _spells(text: str, value: Any) -> bool:
    """Tells whether `text` stands for `value`, read as the type of `value`."""
    read = _parse_scalar(type(value), text)
    return type(read) is type(value) and read == value


def _parse_int(text: str) -> Any:
    if not (_INT.fullmatch(text) or _SCIENTIFIC.fullmatch(text)):
        return MISMATCH
    value = Decimal(text)  # exact, and reads underscores, too
    return int(value) if value == int(value) else MISMATCH


def _parse_tuple(member: Any, text: str, *, bare: bool) -> Any:
    """Reads a tuple; without brackets only if `bare`, as a wider union could mean a string by `a,b`."""
    parts = _split(text[1:-1]) if text and text[-1] == _CLOSING.get(text[0]) else None
    if parts is None and bare and text:
        parts = _split(text)
    if parts is None or (items := items_of(member, len(parts))) is None:
        return MISMATCH
    values = tuple(parse(item, part) for item, part in zip(items, parts, strict=True))
    return MISMATCH if MISMATCH in values else values


def _split(text: str) -> list[str] | None:
    """Splits at the commas outside quotes and brackets; None if brackets do not pair or an item is empty."""
    parts, waiting = [""], []
    for token in _TOKEN.findall(text):
        if token in _CLOSING:
            waiting.append(_CLOSING[token])
        elif token in _CLOSING.values() and (not waiting or waiting.pop() != token):
            return None
        if token == "," and not waiting:
            parts.append("")
        else:
            parts[-1] += token
    parts = [part.strip() for part in parts]
    if not parts[-1]:
        parts.pop()
    return None if waiting or not all(parts) else parts
