"""Converts a config to JSON values and back.

A config object becomes a dict, a tuple a list, an enum member its name, and a float that JSON lacks "nan", "inf" or
"-inf". In a choice the dict also has "kind", the name of the class. If a key is missing, decoding takes the default of
the field, and it knows the former names of fields (`aliases.FORMER`), so that old records stay readable.
"""

import enum
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from jaxinfra.config import schema
from jaxinfra.config.aliases import FORMER
from jaxinfra.config.classes import ClassFinder, find_choice
from jaxinfra.config.extensible import KIND
from jaxinfra.config.schema import MISMATCH, MISSING
from jaxinfra.config.text import error_prefix, join, nearest, same, shorten, show
from jaxinfra.errors import ConfigError

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(root: object) -> dict[str, Any]:
    """Returns a config as dicts, lists and JSON scalars.

    Raises ConfigError if a value does not fit its annotation, or would be decoded as another value.
    """
    return _encode(type(root), schema.conform(type(root), root), "")


def decode[C](cls: type[C], coded: object, finder: ClassFinder | None = None) -> C:
    """Returns the config of class `cls` that `encode` turned into `coded`.

    Without a finder, only classes of jaxinfra are found. Raises ConfigError with the path of a key that is unknown or
    missing, or of a value that does not fit.
    """
    return _decode(cls, coded, "", finder or ClassFinder())


def complete(annotation: object, coded: Any) -> Any:
    """Returns an encoded config with the names of fields of now, and with the defaults of those that it lacks.

    It needs no user classes: their parts stay as they are. Values are not checked.
    """
    if isinstance(coded, list):
        items = schema.item_annotations(annotation, len(coded))
        return coded if items is None else [complete(*each) for each in zip(items, coded, strict=True)]
    if not isinstance(coded, dict):
        return coded
    choices, (first_type, *_) = schema.choices(annotation), schema.union_members(annotation)
    cls = choices.get(str(coded.get(KIND))) if schema.is_choice(annotation) else first_type
    if cls is None or not schema.is_config(cls):
        return coded
    parts = _with_names_of_now(cls, coded)
    whole = {KIND: coded[KIND]} if KIND in coded else {}
    for field in schema.fields_of(cls):
        if field.name in parts:
            whole[field.name] = complete(field.annotation, parts[field.name])
        elif not field.required:
            whole[field.name] = _encode(field.annotation, field.make_default(), field.name)
    return whole | {name: part for name, part in parts.items() if name not in whole}


def _with_names_of_now(cls: type, coded: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an encoded config object by the names that its class has for them now."""
    former = FORMER.get(cls.__name__, {})
    return {former.get(name, name): part for name, part in coded.items()}


def _encode(annotation: object, value: object, path: str) -> Any:
    """Returns the JSON value of a node or leaf that conforms to the annotation; `path` is for messages."""
    if schema.is_config(type(value)):
        coded = {KIND: schema.choice_name(annotation, type(value))} if schema.is_choice(annotation) else {}
        for name, part_annotation, part in schema.children(annotation, value):
            coded[name] = _encode(part_annotation, part, join(path, name))
        return coded
    if isinstance(value, tuple):
        items = schema.item_annotations(annotation, len(value)) or ()  # never None, because the value conforms
        return [_encode(item, part, join(path, i)) for i, (item, part) in enumerate(zip(items, value, strict=True))]
    coded = value.name if isinstance(value, enum.Enum) else value
    if isinstance(value, float) and not math.isfinite(value):
        coded = repr(value)  # one of _NOT_FINITE
    # A string may be decoded as another type: for `str | float`, the string "nan" and the float NaN are both "nan".
    if isinstance(coded, str) and not same(_decode_leaf(annotation, coded), value):
        raise ConfigError(f"{path}={show(value)}: would be stored like a value of another type; use another value")
    return coded


def _decode(annotation: object, coded: object, path: str, finder: ClassFinder) -> Any:
    """Returns the node or leaf that a JSON value stands for, where the annotation tells which of both."""
    first_type = schema.union_members(annotation)[0]
    if isinstance(coded, dict) and schema.is_choice(annotation):
        cls = _decode_kind(annotation, coded.get(KIND, MISSING), join(path, KIND), finder)
        return _decode_fields(cls, {name: part for name, part in coded.items() if name != KIND}, path, finder)
    if isinstance(coded, dict) and schema.is_config(first_type):  # the only type, as the field is not a choice
        return _decode_fields(first_type, coded, path, finder)
    if isinstance(coded, list) and (items := schema.item_annotations(annotation, len(coded))) is not None:
        parts = enumerate(zip(items, coded, strict=True))
        return tuple(_decode(item, part, join(path, index), finder) for index, (item, part) in parts)
    value = _decode_leaf(annotation, coded)
    if value is MISMATCH:
        raise ConfigError(f"{path or 'config'}={_show_json(coded)}: expected {schema.describe(annotation)}")
    return value


def _decode_kind(annotation: object, kind: object, path: str, finder: ClassFinder) -> type:
    """Returns the class of a choice that "kind" names; `path` is that of "kind" itself."""
    cls = None
    if isinstance(kind, str):
        with error_prefix(f"{path}: "):
            cls = schema.choices(annotation).get(kind) or find_choice(annotation, kind, finder)
    if cls is None:
        problem = ": missing;" if kind is MISSING else f"={_show_json(kind)}:"
        raise ConfigError(f"{path}{problem} expected {schema.describe(annotation)}")
    return cls


def _decode_fields(cls: type, coded: Mapping[str, object], path: str, finder: ClassFinder) -> Any:
    fields = {field.name: field for field in schema.fields_of(cls)}
    coded = _with_names_of_now(cls, coded)
    for name in coded:
        if name not in fields:
            near = nearest(name, fields)
            hint = f"did you mean {join(path, near)}?" if near else f"the fields are {', '.join(fields)}"
            raise ConfigError(f"{join(path, name)}: no such field; {hint}")
    for field in fields.values():
        if field.required and field.name not in coded:
            raise ConfigError(f"{join(path, field.name)}: missing; expected {schema.describe(field.annotation)}")
    values = {name: _decode(fields[name].annotation, part, join(path, name), finder) for name, part in coded.items()}
    try:
        config = cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path or 'config'}: {cls.__name__} refused its fields: {shorten(str(error))}") from error
    return schema.conform(cls, config, path)


def _decode_leaf(annotation: object, coded: object) -> object:
    """Returns the value of a JSON scalar, or `MISMATCH`; a string is a Literal, enum member, float or str."""
    if not isinstance(coded, str):
        return schema.match(annotation, coded)
    options = schema.union_members(annotation)
    if any(get_origin(option) is Literal and coded in get_args(option) for option in options):
        return coded
    for option in options:
        if isinstance(option, enum.EnumType) and coded in option.__members__:
            return option.__members__[coded]
    if float in options and coded in _NOT_FINITE:
        return _NOT_FINITE[coded]
    return schema.match(annotation, coded)


def _show_json(coded: object) -> str:
    return shorten(json.dumps(coded, default=repr))
