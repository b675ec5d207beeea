"""Explains config fields from their annotations, defaults and docstrings.

`Field.options` are the classes whose fields lie below a field: for `optim.schedule` all schedules, for `optim` one
class. The classes of an open base are imported only when a path below it is asked for.
"""

import inspect
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxinfra.config import schema
from jaxinfra.config.aliases import ABSENT, path_of_alias
from jaxinfra.config.schema import ConfigField
from jaxinfra.config.text import format_value, join, nearest, snake_case, without_indices
from jaxinfra.errors import ConfigError

# All paths of each root class; tests/golden/write.py generates them, because it takes a second to import all classes.
_FIELD_PATHS = Path(__file__).with_name("field_paths.json")

# An entry of a docstring's "Attributes:" section; the lines that continue it are indented deeper.
_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {5,}.+)*)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Field:
    """A config field at a path."""

    path: str  # from the root, without the class of a choice: `optim.schedule.warmup_steps`
    owner: type  # the class that has the field
    field: ConfigField  # its name, annotation and default
    in_fingerprint: bool  # whether another value makes another run

    @property
    def allowed(self) -> str:
        """The values that the field takes, such as `int at least 1 or none`."""
        return schema.describe(self.field.annotation)

    @property
    def default(self) -> str:
        """The default as text, "" for a group of fields; says "required" without one."""
        if self.field.required:
            return "required"
        annotation = self.field.annotation
        if schema.is_config(schema.union_members(annotation)[0]) and not schema.is_choice(annotation):
            return ""
        bases = schema.open_bases(annotation)
        if bases and self.field.factory == bases[0].default:  # names its first builtin without importing it
            return snake_case(bases[0].builtins[0].partition(":")[2])
        return format_value(self.field.make_default())

    @property
    def meaning(self) -> str:
        """The field's entry in the docstring of its class, as one line; "" without one."""
        return attribute_docs(self.owner).get(self.field.name, "")

    @cached_property
    def options(self) -> dict[str, type]:
        """The config classes that the field holds, by their names in overrides; imports those of an open base."""
        if schema.is_choice(self.field.annotation):
            return schema.choices(self.field.annotation)
        return {snake_case(cls): cls for cls in schema.config_classes(self.field.annotation) if schema.is_config(cls)}


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
            in_fingerprint=in_fingerprint and schema.is_fingerprinted(field.annotation),
        )
        for field in schema.fields_of(cls)
    ]


def find(roots: Iterable[type], path: str) -> list[Field]:
    """Returns the fields at a path of the first root that has it, one for each class of a choice that has it.

    `roots` are `Run` or classes of recipes; an iterator is advanced only while no root has the path. `path` is as in an
    override; or another framework's name for a field, or the last name of a longer path. Raises ConfigError with the
    nearest path if no root has it.
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
    if path.lower() in ABSENT:
        raise ConfigError(f"{path}: jaxinfra has none; use {ABSENT[path.lower()]}")
    known = list(dict.fromkeys(each for root in paths for each in paths[root]))  # each path once
    near = nearest(path, known) or nearest(path.rpartition(".")[2], [each.rpartition(".")[2] for each in known], 0.7)
    top = ", ".join(each for each in known if "." not in each)
    raise ConfigError(f"{path}: no such config field; {f'did you mean {near}?' if near else f'the fields are {top}'}")


def _descend(root: type, path: str) -> list[Field]:
    """Returns the fields at a full path; imports classes of open bases only where the path leads."""
    first, *rest = without_indices(path).split(".")
    fields = [field for field in fields_below(root) if field.field.name == first]
    for name in rest:
        options = [(field, cls) for field in fields for cls in field.options.values()]
        below = [each for field, cls in options for each in fields_below(cls, field)]
        fields = [field for field in below if field.field.name == name]
    return fields
