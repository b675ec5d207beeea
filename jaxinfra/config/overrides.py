"""Overrides, `path=value`, applied to a config from left to right.

The text is read by the annotation of the field. A choice is switched by naming a class; the new object takes
its defaults, except for fields of the same name and type in both classes, which keep their values. Nothing is
dropped silently: an override that a later switch would discard is an error.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfra.config.classes import ClassFinder, find_choice
from jaxinfra.config.extensible import class_name
from jaxinfra.config.parse import parse, unquote
from jaxinfra.config.schema import (
    MISMATCH,
    children,
    choices,
    conform,
    describe,
    fields_of,
    is_choice,
    is_config,
    is_node,
    members,
    walk,
    words_of,
)
from jaxinfra.config.text import is_below, join, nearest, shorten
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Override:
    """One override as it was given."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}={shorten(self.text)}"


@dataclass(frozen=True, kw_only=True)
class _Change:
    """An override about to be applied, with what its messages and checks need to know."""

    override: Override
    earlier: Sequence[Override]
    root: Any
    finder: ClassFinder


def read_overrides(overrides: Sequence[str]) -> list[Override]:
    """Splits overrides into path and text; ConfigError where one has no path or no `=`, or two set the same path."""
    found: dict[str, Override] = {}
    for each in overrides:
        path, equals, text = each.partition("=")
        override = Override(path=path.strip(), text=text.strip())
        if not equals or not override.path:
            raise ConfigError(f"{each}: not an override; write path=value, such as train.steps=100")
        if override.path in found:
            raise ConfigError(f"{found[override.path]} and {override}: set twice; keep one of them")
        found[override.path] = override
    return list(found.values())


def apply[C](root: C, overrides: Sequence[str], finder: ClassFinder | None = None) -> C:
    """Returns `root` with the overrides `path=value` applied; classes that they name by import path are imported.

    ConfigError for an unknown path (with the nearest right one), a value that does not fit (with what was expected), or
    overrides that contradict each other.
    """
    changed: Any = conform(type(root), root)
    pending = read_overrides(overrides)
    for index, override in enumerate(pending):
        change = _Change(override=override, earlier=pending[:index], root=changed, finder=finder or ClassFinder())
        changed = _set(type(root), changed, override.path.split("."), "", change)
    return changed


def _set(annotation: Any, value: Any, names: Sequence[str], path: str, change: _Change) -> Any:
    """Returns `value`, the node at `path`, with the override applied at `names` below it."""
    if not names:
        return _assign(annotation, value, change)
    name, *rest = names
    for part_name, part_annotation, part in children(annotation, value):
        if part_name == name:
            new = _set(part_annotation, part, rest, join(path, name), change)
            if isinstance(value, tuple):
                return (*value[: int(name)], new, *value[int(name) + 1 :])
            return _built(dataclasses.replace, change.override, value, **{name: new})
    raise ConfigError(_unknown_path(annotation, value, names, path, change))


def _assign(annotation: Any, value: Any, change: _Change) -> Any:
    """Returns what the text of the override stands for at a field of this annotation."""
    override = change.override
    if chosen := _chosen(annotation, value, change):
        return _switch(value, chosen, change)
    parsed = parse(annotation, override.text)
    if parsed is not MISMATCH:
        _require_kept(set(), change)
        return parsed
    parts = [join(override.path, name) for name, _, _ in children(annotation, value)]
    if not is_choice(annotation) and is_node(annotation, value):
        inside = f"set one of {', '.join(parts)}" if parts else "it has none to set"
        raise ConfigError(f"{override}: {override.path} is not one value but a group of fields; {inside}")
    usable = [w for w in words_of(annotation) if w in choices(annotation) or parse(annotation, w) is not MISMATCH]
    near = nearest(override.text, usable)
    hint = f"; did you mean {near}?" if near else ""
    raise ConfigError(f"{override}: expected {describe(annotation)}{hint}")


def _chosen(annotation: Any, value: Any, change: _Change) -> type | None:
    """Returns the class of a choice by its name; `AdamW` and `adamw` are found as well as `adam_w`."""
    text = str(unquote(change.override.text))
    if cls := choices(annotation).get(text):
        return cls
    if is_choice(annotation) and text == class_name(type(value)):
        return type(value)
    named = {name.replace("_", ""): cls for name, cls in choices(annotation).items()}
    if cls := named.get(text.replace("_", "").lower()):
        return cls
    try:
        return find_choice(annotation, text, change.finder, anywhere=True)
    except ConfigError as error:
        raise ConfigError(f"{change.override.path}={error}") from error


def _switch(old: Any, cls: type, change: _Change) -> Any:
    if type(old) is cls:
        return old
    before = {field.name: field for field in fields_of(type(old))} if is_config(type(old)) else {}
    kept = {
        field.name: getattr(old, field.name)
        for field in fields_of(cls)
        if field.name in before and members(before[field.name].annotation) == members(field.annotation)
    }
    _require_kept(set(kept), change)
    missing = [field.name for field in fields_of(cls) if field.required and field.name not in kept]
    if missing:
        raise ConfigError(f"{change.override}: has no default for {', '.join(missing)}; set it in the config file")
    return conform(cls, _built(cls, change.override, **kept), change.override.path)


def _require_kept(kept: set[str], change: _Change) -> None:
    """Refuses an assignment that would discard what an earlier override set below the same path."""
    path = change.override.path
    for earlier in change.earlier:
        if is_below(earlier.path, path) and earlier.path.removeprefix(path + ".").split(".")[0] not in kept:
            raise ConfigError(f"{change.override}: would discard {earlier} before it; put {change.override} first")


def _built(build: Callable[..., Any], override: Override, /, *given: Any, **fields: Any) -> Any:
    """Runs a constructor; what its `__post_init__` refuses is the fault of the override."""
    try:
        return build(*given, **fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{override}: {shorten(str(error))}; use another value") from error


def _unknown_path(annotation: Any, value: Any, names: Sequence[str], path: str, change: _Change) -> str:
    full, name = change.override.path, names[0]
    classes = choices(annotation).items()
    owners = [kind for kind, cls in classes if any(field.name == name for field in fields_of(cls))]
    if owners:
        named = " and of ".join(owners)
        return f"{full}: {name} is a field of {named}; choose it first with {path}={owners[0]}"
    if not is_node(annotation, value):
        return f"{full}: {path} takes {describe(annotation)} and has no fields; set {path} itself"
    siblings = [sibling for sibling, _, _ in children(annotation, value)]
    if near := _nearest_path(change.root, path, names, siblings):
        return f"{full}: no such field; did you mean {near}?"
    return f"{full}: no such field; {path or 'the config'} has {', '.join(siblings) or 'none'}"


def _nearest_path(root: Any, path: str, names: Sequence[str], siblings: Sequence[str]) -> str | None:
    """Returns the likeliest existing path: a sibling, a namesake elsewhere, a similar path."""
    known = [each for each, _, _ in walk(type(root), root) if each]
    full = ".".join([path, *names] if path else names)
    sibling = nearest(names[0], siblings)
    mended = ".".join([join(path, sibling), *names[1:]]) if sibling else full
    if mended in known:
        return mended
    namesakes = [each for each in known if each.rpartition(".")[2] == names[-1]]
    if namesakes:
        return nearest(full, namesakes, cutoff=0.0)
    if sibling:
        return nearest(mended, [each for each in known if is_below(each, join(path, sibling))])
    return nearest(full, known, cutoff=0.75)
