"""Applies overrides, `path=value`, to a config, from left to right.

The annotation of a field says how its text is parsed. The name of a class switches a choice to this class: the new
object keeps the values of fields with the same name and type in both classes. A switch must not discard an earlier
override.

In a tuple of config objects an index names one of them: `layers.0.window=512`. Without it, as in `layers.window=512`,
the override is applied to all that have the field.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfra.config import schema
from jaxinfra.config.aliases import path_of_alias
from jaxinfra.config.classes import ClassFinder, find_choice
from jaxinfra.config.extensible import class_name
from jaxinfra.config.parse import parse, unquote
from jaxinfra.config.schema import MISMATCH
from jaxinfra.config.text import error_prefix, join, nearest, shorten, without_indices
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Override:
    """The path and the text of an override."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}={shorten(self.text)}"


def read_overrides(overrides: Sequence[str]) -> list[Override]:
    """Splits overrides into path and text; raises ConfigError if either is missing, or if a path is set twice."""
    by_path: dict[str, Override] = {}
    for each in overrides:
        path, equals, text = each.partition("=")
        override = Override(path=path.strip(), text=text.strip())
        if not equals or not override.path:
            raise ConfigError(f"{each}: not an override; write path=value, such as train.steps=100")
        if override.path in by_path:
            raise ConfigError(f"{by_path[override.path]} and {override}: set twice; keep one of them")
        by_path[override.path] = override
    return list(by_path.values())


def apply[C](root: C, overrides: Sequence[str], finder: ClassFinder | None = None) -> C:
    """Returns `root` with the overrides applied; imports the modules of classes that they name.

    Raises ConfigError for an unknown path, a value that does not fit, or overrides that contradict each other.
    """
    new: Any = schema.conform(type(root), root)
    finder, pending = finder or ClassFinder(), read_overrides(overrides)
    for i, override in enumerate(pending):
        assignment = _Assignment(override=override, earlier=pending[:i], root=new, finder=finder)
        new = assignment.apply(type(root), new, override.path.split("."), "")
    return new


@dataclass(frozen=True, kw_only=True)
class _Assignment:
    """An override that is being applied to `root`, after the `earlier` ones."""

    override: Override
    earlier: Sequence[Override]
    root: object
    finder: ClassFinder  # finds the classes that the override names

    def apply(self, annotation: object, value: Any, names: Sequence[str], path: str) -> Any:
        """Returns `value`, the node at `path`, with the override applied at `names` below it."""
        if not names:
            return self._new_value(annotation, value)
        name, *rest = names
        if isinstance(value, tuple) and schema.is_node(annotation, value) and not name.isdigit():
            return self._apply_to_all(annotation, value, names, path)
        for part_name, part_annotation, part in schema.children(annotation, value):
            if part_name == name:
                new = self.apply(part_annotation, part, rest, join(path, name))
                if isinstance(value, tuple):  # `name` is an index
                    return (*value[: int(name)], new, *value[int(name) + 1 :])
                return self._build(dataclasses.replace, value, **{name: new})
        raise ConfigError(self._unknown_path(annotation, value, name, path))

    def _apply_to_all(self, annotation: object, items: tuple[Any, ...], names: Sequence[str], path: str) -> Any:
        """Returns the tuple with the override applied to all items that have a part at `names`."""
        parts = list(schema.children(annotation, items))
        is_target = [_has_path(part_annotation, part, names) for _, part_annotation, part in parts]
        if not any(is_target):  # raises the error of the first item, which says what it lacks
            is_target[0] = True
        return tuple(
            self.apply(part_annotation, part, names, join(path, index)) if chosen else part
            for (index, part_annotation, part), chosen in zip(parts, is_target, strict=True)
        )

    def _new_value(self, annotation: object, old: object) -> object:
        """Returns the value that the override puts in place of `old`."""
        override = self.override
        if cls := self._chosen_class(annotation, old):
            return self._switch(old, cls)
        parsed = parse(annotation, override.text)
        if parsed is not MISMATCH:
            self._check_nothing_discarded(kept=set())  # a leaf, such as none, keeps no fields
            return parsed
        if not schema.is_choice(annotation) and schema.is_node(annotation, old):
            parts = [join(override.path, name) for name, _, _ in schema.children(annotation, old)]
            fix = f"set one of {', '.join(parts)}" if parts else "it has none to set"
            raise ConfigError(f"{override}: {override.path} is not one value but a group of fields; {fix}")
        near = _nearest_text(annotation, override.text)
        hint = f"; did you mean {override.path}={near}?" if near else ""
        raise ConfigError(f"{override}: expected {schema.describe(annotation)}{hint}")

    def _chosen_class(self, annotation: object, old: object) -> type | None:
        """Returns the class of a choice that the text names: `adam_w`, `AdamW`, `adamw`, or an import path."""
        text = str(unquote(self.override.text))
        # Underscores and capitals do not count.
        by_name = {name.replace("_", ""): cls for name, cls in schema.choices(annotation).items()}
        if cls := by_name.get(text.replace("_", "").lower()):
            return cls
        if schema.is_choice(annotation) and text == class_name(type(old)):
            return type(old)  # its module may have been a config file, which is not imported again
        with error_prefix(f"{self.override.path}="):
            return find_choice(annotation, text, self.finder, anywhere=True)

    def _switch(self, old: object, cls: type) -> object:
        """Returns an object of `cls` with the values of the fields that it shares with `old`."""
        if type(old) is cls:
            return old
        old_fields = schema.fields_of(type(old)) if schema.is_config(type(old)) else ()
        old_types = {field.name: schema.union_members(field.annotation) for field in old_fields}
        kept = {
            field.name: getattr(old, field.name)
            for field in schema.fields_of(cls)
            if old_types.get(field.name) == schema.union_members(field.annotation)
        }
        self._check_nothing_discarded(set(kept))
        missing = [field.name for field in schema.fields_of(cls) if field.required and field.name not in kept]
        if missing:
            raise ConfigError(f"{self.override}: has no default for {', '.join(missing)}; set it in the config file")
        return schema.conform(cls, self._build(cls, **kept), self.override.path)

    def _check_nothing_discarded(self, kept: set[str]) -> None:
        """Raises ConfigError if an earlier override has set a field below the path that is not one of `kept`."""
        for earlier in self.earlier:
            below = _names_below(earlier.path.split("."), self.override.path.split("."))
            if below and below[0] not in kept:
                raise ConfigError(f"{self.override}: would discard {earlier} before it; put {self.override} first")

    def _build[T](self, constructor: Callable[..., T], *args: Any, **fields: Any) -> T:
        """Calls a constructor; if a `__post_init__` raises, the ConfigError names the override."""
        try:
            return constructor(*args, **fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.override}: {shorten(str(error))}; use another value") from error

    def _unknown_path(self, annotation: object, value: object, name: str, path: str) -> str:
        """Returns the message for a path whose `name` is no part of `value`, the node at `path`."""
        full = self.override.path
        # The classes of the choice that have this field; the class of `value` does not.
        choices = schema.choices(annotation).items()
        owners = [kind for kind, cls in choices if any(field.name == name for field in schema.fields_of(cls))]
        if owners:
            return f"{full}: {name} is a field of {' and of '.join(owners)}; choose it first with {path}={owners[0]}"
        if not schema.is_node(annotation, value):
            return f"{full}: {path} takes {schema.describe(annotation)} and has no fields; set {path} itself"
        if near := self._nearest_path():
            return f"{full}: no such field; did you mean {near}?"
        siblings = [sibling for sibling, _, _ in schema.children(annotation, value)]
        return f"{full}: no such field; {path or 'the config'} has {', '.join(siblings) or 'none'}"

    def _nearest_path(self) -> str | None:
        """Guesses the path that was meant: an alias, a misspelling, or a field of this name elsewhere."""
        paths = [each for each, _, _ in schema.walk(type(self.root), self.root) if each]
        known = list(dict.fromkeys([*map(without_indices, paths), *paths]))  # without indices first
        full = self.override.path
        same_name = [each for each in known if each.rpartition(".")[2] == full.rpartition(".")[2]]
        if (alias := path_of_alias(full)) in known:
            return alias
        # A misspelling is much like the path. Of fields with this last name, any is better than no hint.
        return nearest(full, known, cutoff=0.75) or nearest(full, same_name, cutoff=0.0)


def _has_path(annotation: object, value: object, names: Sequence[str]) -> bool:
    """Tells whether a node has a part at `names`, which may leave out indices."""
    if not names:
        return True
    parts = list(schema.children(annotation, value))
    if isinstance(value, tuple) and not names[0].isdigit():  # without an index, any item may have the part
        return any(_has_path(part_annotation, part, names) for _, part_annotation, part in parts)
    return any(_has_path(part_annotation, part, names[1:]) for name, part_annotation, part in parts if name == names[0])


def _names_below(names: Sequence[str], prefix: Sequence[str]) -> Sequence[str]:
    """Returns what follows `prefix` in a path, [] if the path does not begin with it; either may leave out indices."""
    while prefix:
        if names[:1] == prefix[:1]:
            names, prefix = names[1:], prefix[1:]
        elif names and names[0].isdigit() != prefix[0].isdigit():  # skips an index that the other one leaves out
            names, prefix = (names[1:], prefix) if names[0].isdigit() else (names, prefix[1:])
        else:
            return []
    return names


def _nearest_text(annotation: object, text: str) -> str | None:
    """Returns the text most similar to one that does not fit; of a tuple, with its wrong items replaced."""
    names = schema.choices(annotation)
    words = schema.allowed_words(annotation)  # some only describe a value, such as "int at least 1"
    usable = [word for word in words if word in names or parse(annotation, word) is not MISMATCH]
    if near := nearest(text, usable):
        return near
    items = [item.strip() for item in text.strip("()[]").split(",")]
    annotations = schema.item_annotations(annotation, len(items))
    if annotations is None:
        return None
    pairs = zip(annotations, items, strict=True)
    fitting = [item if parse(each, item) is not MISMATCH else _nearest_text(each, item) for each, item in pairs]
    return None if None in fitting else ",".join(map(str, fitting))
