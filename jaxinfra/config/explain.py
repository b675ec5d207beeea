"""Explains config fields from their annotations, defaults and docstrings.

`Field.options` are the classes whose fields lie below a field: for `optim.schedule` all schedules, for `optim` one
class. The classes of an open base are imported only when a path below it is asked for.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxinfra.config.aliases import path_of_alias
from jaxinfra.config.schema import (
    ConfigField,
    choices,
    config_classes,
    describe,
    fields_of,
    is_choice,
    is_config,
    is_fingerprinted,
    open_bases,
    union_members,
)
from jaxinfra.config.text import format_value, join, nearest, snake_case, without_indices
from jaxinfra.errors import ConfigError

_FIELD_PATHS = Path(__file__).with_name("field_paths.json")  # generated: to import all classes takes a second

# An entry of a docstring's "Attributes:" section; the lines that continue it are indented deeper.
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {5,}.+)*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A config field at a path.

    Attributes:
        path: dotted path from the root, with the class in place of a choice: `optim.schedule.warmup_steps`.
        owner: the class that has the field.
        field: its name, annotation and default.
        in_fingerprint: whether another value makes another run.
    """

    path: str
    owner: type
    field: ConfigField
    in_fingerprint: bool

    @property
    def allowed(self) -> str:
        """The values that the field takes, such as `int at least 1 or none`."""
        return describe(self.field.annotation)

    @property
    def default(self) -> str:
        """The default as text, "" for a group of fields; says "required" without one."""
        if self.field.required:
            return "required"
        if is_config(union_members(self.field.annotation)[0]) and not is_choice(self.field.annotation):
            return ""
        if self.options_are_open and self.field.factory == (base := open_bases(self.field.annotation)[0]).default:
            return snake_case(base.builtins[0].partition(":")[2])  # without importing it
        return format_value(self.field.make_default())

    @property
    def meaning(self) -> str:
        """The field's entry in the docstring of its class, as one line; "" without one."""
        return attribute_docs(self.owner).get(self.field.name, "")

    @property
    def options_are_open(self) -> bool:
        """Whether the field takes any subclass of an open base, so that `options` imports those of jaxinfra."""
        return bool(open_bases(self.field.annotation))

    @cached_property
    def options(self) -> dict[str, type]:
        """The config classes that the field holds, by their names in overrides; imports those of an open base."""
        if is_choice(self.field.annotation):
            return choices(self.field.annotation)
        return {snake_case(cls): cls for cls in config_classes(self.field.annotation) if is_config(cls)}


def attribute_docs(cls: type) -> dict[str, str]:
    """Returns the "Attributes:" section of a class and its bases: name to text on one line."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        docs |= {name: " ".join(text.split()) for name, text in _ATTRIBUTE.findall(section)}
    return docs


def fields_below(cls: type, parent: Field | None = None) -> list[Field]:
    """Returns the fields of a config class, the root or one of the `options` of `parent`."""
    path, in_fingerprint = (parent.path, parent.in_fingerprint) if parent else ("", True)
    return [
        Field(
            path=join(path, field.name),
            owner=cls,
            field=field,
            in_fingerprint=in_fingerprint and is_fingerprinted(field.annotation),
        )
        for field in fields_of(cls)
    ]


def all_fields(root: type, parent: Field | None = None) -> Iterator[Field]:
    """Yields every field below a config class, depth first; imports all classes of open bases."""
    for field in fields_below(root, parent):
        yield field
        for cls in field.options.values():
            yield from all_fields(cls, field)


def find(roots: Iterable[type], path: str) -> list[Field]:
    """Returns the fields at a path of the first root that has it, one for each class of a choice that has it.

    The path may also be another framework's name for a field, or else the last name of a path further down. Asks for
    the next root only if those before have no such path. Raises ConfigError with the nearest path if none has it.

    Args:
        roots: `Run` or classes of recipes.
        path: as in an override.
    """
    paths: dict[type, list[str]] = {}
    alias = path_of_alias(path)
    for root in roots:
        if found := _descend(root, path) or (alias and _descend(root, alias)):
            return found
        paths[root] = json.loads(_FIELD_PATHS.read_text(encoding="utf-8"))[root.__name__]
    for root in paths:
        if same_name := [each for each in paths[root] if each.rpartition(".")[2] == path]:
            return [field for each in same_name for field in _descend(root, each)]
    known = list(dict.fromkeys(each for root in paths for each in paths[root]))
    near = nearest(path, known) or nearest(path.rpartition(".")[2], [each.rpartition(".")[2] for each in known])
    top = ", ".join(each for each in known if "." not in each)
    raise ConfigError(f"{path}: no such config field; {f'did you mean {near}?' if near else f'the fields are {top}'}")


def _descend(root: type, path: str) -> list[Field]:
    """Returns the fields at a full path; imports open classes only where the path leads."""
    names = without_indices(path).split(".")
    fields = fields_below(root)
    for depth, name in enumerate(names):
        if depth:
            fields = [below for field in fields for cls in field.options.values() for below in fields_below(cls, field)]
        fields = [field for field in fields if field.field.name == name]
    return fields
