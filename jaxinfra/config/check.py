"""Validation of a config: types, limits, and the problems that config classes find in themselves.

A config class may define `problems()`, which yields a `Problem` for each conflict between its fields. The parts of an
object are checked before its own `problems()`, which may therefore rely on valid parts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxinfra.config import schema
from jaxinfra.config.schema import MISSING, ConfigField
from jaxinfra.config.text import format_value, join, show
from jaxinfra.errors import ConfigError
from jaxinfra.storage.credentials import has_credentials

# The first name of each `path=` in a text: `schedule` in "use schedule.warmup_steps=10".
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
    _validate(type(root), schema.conform(type(root), root), "")


def _validate(annotation: object, node: object, path: str) -> None:
    for name, part_annotation, part in schema.children(annotation, node):
        _validate(part_annotation, part, join(path, name))
    if not schema.is_config(type(node)):
        return
    for field in schema.fields_of(type(node)):
        value = getattr(node, field.name)
        if any(map(has_credentials, _texts(value))):
            raise ConfigError(
                f"{join(path, field.name)}={show(value)}: has credentials in it, which run.json would store; "
                "set them in the environment or a profile"
            )
        if not schema.within_limits(field.annotation, value):
            raise ConfigError(_limit_message(field, value, join(path, field.name)))
    for problem in getattr(node, "problems", tuple)():  # `tuple()` has no problems
        raise ConfigError(_problem_message(node, path, problem))


def _texts(value: object) -> Iterator[str]:
    """Yields a value that is a string, and the strings in nested tuples."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts(item)


def _limit_message(field: ConfigField, value: object, path: str) -> str:
    """Returns the message for a value outside its limits; the fix is the default, or else the smallest value."""
    default = field.make_default()
    allowed = default if schema.within_limits(field.annotation, default) else schema.smallest_allowed(field.annotation)
    fix = "" if allowed is MISSING else f"; use {path}={format_value(allowed)}"
    return f"{path}={show(value)}: expected {schema.describe(field.annotation)}{fix}"


def _problem_message(node: object, path: str, problem: Problem) -> str:
    """Returns the message for a problem of the node at `path`, with full paths in place of those below the node."""
    values = ", ".join(f"{join(path, field)}={show(_value_at(node, field))}" for field in problem.fields)
    own_fields = {field.name for field in schema.fields_of(type(node))}
    # Other names are options of a command.
    fix = _ASSIGNED.sub(lambda name: join(path, name[1]) if name[1] in own_fields else name[1], problem.fix)
    return f"{values}: {problem.message}; {fix}"


def _value_at(node: object, field: str) -> object:
    """Returns the value at a path below a config object, which may have indices: `sources.0.packing`."""
    for name in field.split("."):
        node = node[int(name)] if isinstance(node, tuple) else getattr(node, name)
    return node
