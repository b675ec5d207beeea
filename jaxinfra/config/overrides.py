"""Application of overrides, `path=value`, to a config, from left to right.

A text is read by the annotation of its field. The name of a class switches a choice: the new object keeps the values of
fields that have the same name and type in both classes. An override that a later switch would discard is an error.
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
from jaxinfra.config.text import error_prefix, is_below, join, nearest, shorten
from jaxinfra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Override:
    """The path and the text of an override."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}={shorten(self.text)}"


def read_overrides(overrides: Sequence[str]) -> list[Override]:
    """Splits overrides into path and text; raises ConfigError for one without them, or for a path that is set twice."""
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
    """Returns `root` with the overrides applied; imports the modules of classes that they name.

    Raises ConfigError for an unknown path, a value that does not fit, or overrides that contradict each other.
    """
    changed: Any = conform(type(root), root)
    pending = read_overrides(overrides)
    for index, override in enumerate(pending):
        assignment = _Assignment(
            override=override, earlier=pending[:index], root=changed, finder=finder or ClassFinder()
        )
        changed = assignment.apply(type(root), changed, override.path.split("."), "")
    return changed


@dataclass(frozen=True, kw_only=True)
class _Assignment:
    """An override that is being applied to `root`, after the `earlier` ones."""

    override: Override
    earlier: Sequence[Override]
    root: object
    finder: ClassFinder

    def apply(self, annotation: object, value: Any, names: Sequence[str], path: str) -> Any:
        """Returns `value`, the node at `path`, with the override applied at `names` below it."""
        if not names:
            return self._new_value(annotation, value)
        name, *rest = names
        for part_name, part_annotation, part in children(annotation, value):
            if part_name == name:
                new = self.apply(part_annotation, part, rest, join(path, name))
                if isinstance(value, tuple):
                    return (*value[: int(name)], new, *value[int(name) + 1 :])
                return self._build(dataclasses.replace, value, **{name: new})
        raise ConfigError(self._unknown_path(annotation, value, names, path))

    def _new_value(self, annotation: object, old: object) -> object:
        override = self.override
        if cls := self._chosen_class(annotation, old):
            return self._switch(old, cls)
        parsed = parse(annotation, override.text)
        if parsed is not MISMATCH:
            self._require_kept(set())
            return parsed
        if not is_choice(annotation) and is_node(annotation, old):
            parts = [join(override.path, name) for name, _, _ in children(annotation, old)]
            fix = f"set one of {', '.join(parts)}" if parts else "it has none to set"
            raise ConfigError(f"{override}: {override.path} is not one value but a group of fields; {fix}")
        usable = [w for w in words_of(annotation) if w in choices(annotation) or parse(annotation, w) is not MISMATCH]
        near = nearest(override.text, usable)
        hint = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"{override}: expected {describe(annotation)}{hint}")

    def _chosen_class(self, annotation: object, old: object) -> type | None:
        """Returns the class of a choice that the text names: `adam_w`, `AdamW`, `adamw`, or an import path."""
        text = str(unquote(self.override.text))
        named = choices(annotation)
        without_underscores = {name.replace("_", ""): cls for name, cls in named.items()}
        if cls := named.get(text) or without_underscores.get(text.replace("_", "").lower()):
            return cls
        if is_choice(annotation) and text == class_name(type(old)):
            return type(old)  # its module may have been a config file, which is not imported again
        with error_prefix(f"{self.override.path}="):
            return find_choice(annotation, text, self.finder, anywhere=True)

    def _switch(self, old: object, cls: type) -> object:
        if type(old) is cls:
            return old
        before = {field.name: field for field in fields_of(type(old))} if is_config(type(old)) else {}
        kept = {
            field.name: getattr(old, field.name)
            for field in fields_of(cls)
            if field.name in before and members(before[field.name].annotation) == members(field.annotation)
        }
        self._require_kept(set(kept))
        missing = [field.name for field in fields_of(cls) if field.required and field.name not in kept]
        if missing:
            raise ConfigError(f"{self.override}: has no default for {', '.join(missing)}; set it in the config file")
        return conform(cls, self._build(cls, **kept), self.override.path)

    def _require_kept(self, kept: set[str]) -> None:
        """Refuses to discard what an earlier override has set below the path, outside the fields `kept`."""
        path = self.override.path
        for earlier in self.earlier:
            if is_below(earlier.path, path) and earlier.path.removeprefix(path + ".").split(".")[0] not in kept:
                raise ConfigError(f"{self.override}: would discard {earlier} before it; put {self.override} first")

    def _build[T](self, constructor: Callable[..., T], *given: Any, **fields: Any) -> T:
        """Calls a constructor; an error in a `__post_init__` is one of the override."""
        try:
            return constructor(*given, **fields)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.override}: {shorten(str(error))}; use another value") from error

    def _unknown_path(self, annotation: object, value: object, names: Sequence[str], path: str) -> str:
        full, name = self.override.path, names[0]
        owners = [kind for kind, cls in choices(annotation).items() if name in (each.name for each in fields_of(cls))]
        if owners:
            return f"{full}: {name} is a field of {' and of '.join(owners)}; choose it first with {path}={owners[0]}"
        if not is_node(annotation, value):
            return f"{full}: {path} takes {describe(annotation)} and has no fields; set {path} itself"
        siblings = [sibling for sibling, _, _ in children(annotation, value)]
        if near := self._nearest_path(path, names, siblings):
            return f"{full}: no such field; did you mean {near}?"
        return f"{full}: no such field; {path or 'the config'} has {', '.join(siblings) or 'none'}"

    def _nearest_path(self, path: str, names: Sequence[str], siblings: Sequence[str]) -> str | None:
        """Returns the likeliest existing path: one with a sibling's name, of a field of this name, or a similar one."""
        known = [each for each, _, _ in walk(type(self.root), self.root) if each]
        full = self.override.path
        sibling = nearest(names[0], siblings)
        corrected = ".".join([join(path, sibling), *names[1:]]) if sibling else full
        if corrected in known:
            return corrected
        same_name = [each for each in known if each.rpartition(".")[2] == names[-1]]
        if same_name:
            return nearest(full, same_name, cutoff=0.0)
        if sibling:
            return nearest(corrected, [each for each in known if is_below(each, join(path, sibling))])
        return nearest(full, known, cutoff=0.75)
