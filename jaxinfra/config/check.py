"""Problems that a config class finds in itself, and the walk that turns the first one into an error.

A class checks what it can see: its own fields and everything below them. Parts are checked before the whole,
so a check across fields may rely on the local checks of its parts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from jaxinfra.config.schema import MISSING, ConfigField, conform, describe, fields_of, is_config, is_within, least, walk
from jaxinfra.config.text import format_value, join, show
from jaxinfra.errors import ConfigError
from jaxinfra.storage.credentials import has_credentials

_ASSIGNED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)(?=(?:\.\w+)*=)")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a config."""

    fields: tuple[str, ...]  # dotted paths of the fields at fault, relative to the config object that reports them
    message: str  # what is wrong with their values
    fix: str  # what to do; a `path=value` in it is relative too and is shown with its full path


def validate(root: Any) -> None:
    """Checks a whole config: the type of every value, then the limits and `problems()` of every part, depth first.

    A part's `problems()` may rely on the limits of its fields. No part may have a URL with credentials in it: records
    keep every value. The first problem is a ConfigError, `path=value, path=value: message; fix`.
    """
    root = conform(type(root), root)
    for path, _, node in walk(type(root), root, parts_first=True):
        if not is_config(type(node)):
            continue
        for field in fields_of(type(node)):
            value = getattr(node, field.name)
            if any(map(has_credentials, _texts(value))):
                raise ConfigError(
                    f"{join(path, field.name)}={show(value)}: has credentials in it, which records would keep; "
                    "give them by the environment or a profile"
                )
            if not is_within(field.annotation, value):
                raise ConfigError(_outside(field, value, join(path, field.name)))
        for problem in getattr(node, "problems", tuple)():
            raise ConfigError(_message(node, path, problem))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        yield from chain.from_iterable(map(_texts, value))


def _outside(field: ConfigField, value: Any, path: str) -> str:
    works = field.make_default()
    works = works if is_within(field.annotation, works) else least(field.annotation)
    fix = "" if works is MISSING else f"; use {path}={format_value(works)}"
    return f"{path}={show(value)}: expected {describe(field.annotation)}{fix}"


def _message(node: Any, path: str, problem: Problem) -> str:
    named = ", ".join(f"{join(path, field)}={show(_value_at(node, field))}" for field in problem.fields)
    own = {field.name for field in fields_of(type(node))}
    fix = _ASSIGNED.sub(lambda found: join(path, found[1]) if found[1] in own else found[1], problem.fix)
    return f"{named}: {problem.message}; {fix}"


def _value_at(node: Any, field: str) -> Any:
    for name in field.split("."):
        node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
    return node
