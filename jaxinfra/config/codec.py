"""Config to JSON-able tree and back, each the exact inverse of the other.

Config objects are objects, tuples are lists, enum members are names, floats that JSON has no number for are
the strings "nan", "inf" and "-inf". The object in a choice has the name of its class under "kind". A key that
a stored tree lacks takes the default of its field, so that a field can be added without breaking old records.
"""

import enum
import json
import math
from typing import Any, Literal, get_origin

from jaxinfra.config.classes import ClassFinder, find_choice
from jaxinfra.config.extensible import KIND
from jaxinfra.config.schema import (
    MISMATCH,
    MISSING,
    children,
    choice_name,
    choices,
    conform,
    describe,
    fields_of,
    is_choice,
    is_config,
    is_node,
    items_of,
    match,
    members,
)
from jaxinfra.config.text import join, nearest, same, shorten, show
from jaxinfra.errors import ConfigError

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(root: Any) -> dict[str, Any]:
    """Returns a config object as a tree of dicts, lists and JSON scalars.

    ConfigError where a value does not fit its annotation, or its stored form would be ambiguous.
    """
    return _encode(type(root), conform(type(root), root), "")


def decode[C](cls: type[C], tree: Any, finder: ClassFinder | None = None) -> C:
    """Builds a `cls` from the tree that `encode` made of one.

    ConfigError, with the path, for an unknown key, a missing one, or a value of the wrong type. Classes that open
    choices name are found by `finder`; without one they must be of jaxinfra.
    """
    return _decode(cls, tree, "", finder or ClassFinder())


def _encode(annotation: Any, value: Any, path: str) -> Any:
    if is_config(type(value)):
        tag = {KIND: choice_name(annotation, type(value))} if is_choice(annotation) else {}
        return tag | {
            name: _encode(part_annotation, part, join(path, name))
            for name, part_annotation, part in children(annotation, value)
        }
    if isinstance(value, tuple):
        fitting = (each for each in _tuples(annotation) if is_node(each, value) or match(each, value) is not MISMATCH)
        items = items_of(next(fitting), len(value)) or ()
        return [_encode(item, part, join(path, i)) for i, (item, part) in enumerate(zip(items, value, strict=True))]
    coded = value
    if isinstance(value, enum.Enum):
        coded = value.name
    elif isinstance(value, float) and not math.isfinite(value):
        coded = repr(value)
    if isinstance(coded, str) and not same(_decode_leaf(annotation, coded), value):
        raise ConfigError(f"{path}={show(value)}: would be stored like a value of another type; use another")
    return coded


def _tuples(annotation: Any) -> list[Any]:
    return [member for member in members(annotation) if get_origin(member) is tuple]


def _decode(annotation: Any, coded: Any, path: str, finder: ClassFinder) -> Any:
    if isinstance(coded, dict):
        if is_choice(annotation):
            cls = _decode_kind(annotation, coded.get(KIND, MISSING), join(path, KIND), finder)
            return _decode_fields(cls, {name: part for name, part in coded.items() if name != KIND}, path, finder)
        if is_config(cls := members(annotation)[0]):
            return _decode_fields(cls, coded, path, finder)
    if isinstance(coded, list) and _tuples(annotation):
        return _decode_tuple(annotation, coded, path, finder)
    value = _decode_leaf(annotation, coded)
    if value is MISMATCH:
        raise ConfigError(f"{path or 'config'}={_show_json(coded)}: expected {describe(annotation)}")
    return value


def _decode_kind(annotation: Any, kind: Any, path: str, finder: ClassFinder) -> type:
    cls = choices(annotation).get(kind) if isinstance(kind, str) else None
    try:
        if cls or (cls := find_choice(annotation, kind, finder) if isinstance(kind, str) else None):
            return cls
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    found = ": missing;" if kind is MISSING else f"={_show_json(kind)}:"
    raise ConfigError(f"{path}{found} expected {describe(annotation)}")


def _decode_fields(cls: type, coded: dict[str, Any], path: str, finder: ClassFinder) -> Any:
    fields = {field.name: field for field in fields_of(cls)}
    for name in coded:
        if name not in fields:
            near = nearest(name, fields)
            hint = f"did you mean {join(path, near)}?" if near else f"the fields are {', '.join(fields)}"
            raise ConfigError(f"{join(path, name)}: no such field; {hint}")
    for field in fields.values():
        if field.required and field.name not in coded:
            raise ConfigError(f"{join(path, field.name)}: missing; expected {describe(field.annotation)}")
    values = {name: _decode(fields[name].annotation, part, join(path, name), finder) for name, part in coded.items()}
    try:
        built = cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path or 'config'}: {cls.__name__} refused its fields: {shorten(str(error))}") from error
    return conform(cls, built, path)


def _decode_tuple(annotation: Any, coded: list[Any], path: str, finder: ClassFinder) -> tuple[Any, ...]:
    """Reads a list as the first tuple of the annotation that takes it; the last one reports what is wrong."""
    problem = ConfigError(f"{path}={_show_json(coded)}: expected {describe(annotation)}")
    for member in _tuples(annotation):
        items = items_of(member, len(coded))
        if items is not None:
            try:
                parts = enumerate(zip(items, coded, strict=True))
                return tuple(_decode(item, part, join(path, index), finder) for index, (item, part) in parts)
            except ConfigError as error:
                problem = error
    raise problem


def _decode_leaf(annotation: Any, coded: Any) -> Any:
    """Returns the leaf that a JSON scalar stands for, or `MISMATCH`; of a string the narrowest reading."""
    if isinstance(coded, str):
        options = members(annotation)
        if any(get_origin(option) is Literal and match(option, coded) is coded for option in options):
            return coded
        for option in options:
            if isinstance(option, enum.EnumType) and coded in option.__members__:
                return option.__members__[coded]
        if float in options and coded in _NOT_FINITE:
            return _NOT_FINITE[coded]
    return match(annotation, coded)


def _show_json(coded: Any) -> str:
    return shorten(json.dumps(coded, default=repr))
