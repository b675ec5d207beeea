"""Validation of a config: types, limits, and the problems that config classes find in themselves.

The parts of an object are checked before its own `problems()`, which may therefore rely on valid parts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfra.config.schema import (
    MISMATCH,
    MISSING,
    ConfigField,
    children,
    conform,
    describe,
    fields_of,
    is_config,
    is_node,
    match,
    smallest_allowed,
)
from jaxinfra.config.text import format_value, join, show
from jaxinfra.errors import ConfigError
from jaxinfra.storage.credentials import has_credentials

# The first name of each `path=` in a text.
_ASSIGNED = re.compile(r"(?<![\w.])([A-Za-z_]\w*)(?=(?:\.\w+)*=)")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem that a config object reports. Its paths are relative to the object; messages show full paths."""

    fields: tuple[str, ...]  # paths of the fields with wrong values
    message: str  # what is wrong
    fix: str  # what to do, such as "use steps=100"


def validate(root: object) -> None:
    """Checks the types of all values, then the limits, credentials in URLs and `problems()` of every part.

    Raises ConfigError for the first problem: `path=value, path=value: message; fix`.
    """
    _validate(type(root), conform(type(root), root), "")


def _validate(annotation: object, node: object, path: str) -> None:
    for name, part_annotation, part in children(annotation, node):
        _validate(part_annotation, part, join(path, name))
    if not is_config(type(node)):
        return
    for field in fields_of(type(node)):
        value = getattr(node, field.name)
        if any(map(has_credentials, _texts(value))):
            raise ConfigError(
                f"{join(path, field.name)}={show(value)}: has credentials in it, which run.json would store; "
                "set them in the environment or a profile"
            )
        if not is_node(field.annotation, value) and match(field.annotation, value, within_limits=True) is MISMATCH:
            raise ConfigError(_limit_message(field, value, join(path, field.name)))
    for problem in getattr(node, "problems", tuple)():
        raise ConfigError(_problem_message(node, path, problem))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)


def _limit_message(field: ConfigField, value: object, path: str) -> str:
    allowed = match(field.annotation, field.make_default(), within_limits=True)
    if allowed is MISMATCH:  # the default, if there is one, is not allowed either
        allowed = smallest_allowed(field.annotation)
    fix = "" if allowed is MISSING else f"; use {path}={format_value(allowed)}"
    return f"{path}={show(value)}: expected {describe(field.annotation)}{fix}"


def _problem_message(node: object, path: str, problem: Problem) -> str:
    values = ", ".join(f"{join(path, field)}={show(_value_at(node, field))}" for field in problem.fields)
    # The fix may name fields of the object, which need their full path, and options of the command line, which do not.
    own = {field.name for field in fields_of(type(node))}
    fix = _ASSIGNED.sub(lambda match: join(path, match[1]) if match[1] in own else match[1], problem.fix)
    return f"{values}: {problem.message}; {fix}"


def _value_at(node: object, field: str) -> object:
    for name in field.split("."):
        node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
    return node
