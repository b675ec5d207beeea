"""What a config class may hold, read from its annotations.

A *config class* is a dataclass. A *leaf* is an int, float, bool, str, None, enum member, one of a `Literal`,
or a tuple of these. A *node* is a config object or a non-empty tuple of config objects. A field whose
annotation is a union with a config class in it is a *choice*: members are chosen by snake_case class name.
`Annotated` says more of a field: limits of annotated-types, such as `Annotated[int, Ge(1)]`, and `NOT_FINGERPRINTED`.

Nothing here reads or writes text. `conform` holds the invariant that the rest of the package relies on: every
value in the tree has exactly the type that its annotation says, so an int in a float field becomes a float.
"""

import dataclasses
import enum
import functools
import math
import operator
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen

from jaxinfra.config.extensible import KIND, Extensible, class_name
from jaxinfra.config.text import format_value, join, one_of, show, snake_case
from jaxinfra.errors import ConfigError

_LIMITS: dict[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (operator.ge, "at least"),
    Gt: (operator.gt, "above"),
    Le: (operator.le, "at most"),
    Lt: (operator.lt, "below"),
    MinLen: (lambda text, length: len(text) >= length, "with characters, at least"),
}
_SCALARS = (bool, int, float, str, types.NoneType)


class _Mark(enum.Enum):
    MISMATCH = enum.auto()
    NOT_FINGERPRINTED = enum.auto()


NOT_FINGERPRINTED = _Mark.NOT_FINGERPRINTED
"""In `Annotated`: two configs that differ in this field, or below it, alone have one fingerprint."""

MISMATCH = _Mark.MISMATCH
"""What a match or a parse returns when the value does not fit; None cannot say so, as it is a leaf value."""

MISSING = dataclasses.MISSING  # the default of a field that has none


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """One field of a config class, its annotation resolved."""

    name: str
    annotation: Any
    default: Any
    factory: Any

    @property
    def required(self) -> bool:
        """Whether the field must be given."""
        return self.default is MISSING and self.factory is MISSING

    def make_default(self) -> Any:
        """Returns the default value, of the exact type of the field, or `MISSING`."""
        if self.required:
            return MISSING
        value = self.default if self.factory is MISSING else self.factory()
        return conform(self.annotation, value, self.name)


@functools.cache
def fields_of(cls: type) -> tuple[ConfigField, ...]:
    """Returns the fields that `cls` is built from, in order; derived ones (`init=False`) are left out.

    ConfigError where an annotation cannot be resolved or says something that a config cannot hold.
    """
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ConfigError(
            f"{cls.__qualname__}: an annotation names {error.name}, which {cls.__module__} does not define; "
            f"import it there at run time"
        ) from error
    given = [field for field in dataclasses.fields(cls) if field.init]
    for field in given:
        _require_supported(hints[field.name], f"{cls.__qualname__}.{field.name}")
    return tuple(
        ConfigField(name=each.name, annotation=hints[each.name], default=each.default, factory=each.default_factory)
        for each in given
    )


def reachable(cls: type, found: dict[type, None] | None = None) -> dict[type, None]:
    """Reads the annotations of `cls` and of all config classes that they name; returns these classes.

    String annotations are looked up in the module of their class. The module of a config file is gone after
    loading, so this must happen before.
    """
    found = {} if found is None else found
    if cls not in found:
        found[cls] = None
        for field in fields_of(cls):
            for part in filter(is_config, _classes(field.annotation)):
                reachable(part, found)
    return found


def members(annotation: Any) -> tuple[Any, ...]:
    """Returns the alternatives of an annotation, nested unions and `type` aliases flattened, without metadata."""
    return tuple(dict.fromkeys(member for member, _ in _alternatives(annotation)))


def _alternatives(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yields each alternative of an annotation with its metadata."""
    if isinstance(annotation, typing.TypeAliasType):
        yield from _alternatives(annotation.__value__, metadata)
    elif get_origin(annotation) is Annotated:
        yield from _alternatives(annotation.__origin__, (*metadata, *annotation.__metadata__))
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part, metadata)
    else:
        yield types.NoneType if annotation is None else annotation, metadata


def is_within(annotation: Any, value: Any) -> bool:
    """Tells whether a value that conforms lies within the limits of its annotation."""
    return any(_member_has(member, metadata, value) for member, metadata in _alternatives(annotation))


def _member_has(member: Any, metadata: tuple[Any, ...], value: Any) -> bool:
    if get_origin(member) is tuple:
        items = items_of(member, len(value)) if isinstance(value, tuple) else None
        return items is not None and all(is_within(*pair) for pair in zip(items, value, strict=True))
    fits = accepts(member, type(value)) or match(member, value) is not MISMATCH
    return fits and all(holds(value, bound) for bound, holds, _ in _limits(metadata))


def _limits(metadata: Iterable[Any]) -> Iterator[tuple[Any, Callable[[Any, Any], bool], str]]:
    """Yields each limit's bound, what must hold of a value and it, and the words for that."""
    for each in metadata:
        if type(each) in _LIMITS:
            yield *dataclasses.astuple(each), *_LIMITS[type(each)]


def least(annotation: Any) -> Any:
    """Returns the lower limit of an annotation, a text that is long enough, or `MISSING`."""
    for limit in (each for _, metadata in _alternatives(annotation) for each in metadata):
        if isinstance(limit, Ge):
            return limit.ge
        if isinstance(limit, MinLen):
            return "NAME".ljust(limit.min_length, "_")
    return MISSING


def is_config(cls: Any) -> bool:
    """Tells whether `cls` is a config class."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


def is_open(cls: Any) -> bool:
    """Tells whether `cls` is an open base: every config class that inherits from it is a valid value."""
    return isinstance(cls, type) and issubclass(cls, Extensible) and not is_config(cls)


def accepts(annotation: Any, cls: type) -> bool:
    """Tells whether objects of the config class `cls` are values of an annotation."""
    options = members(annotation)
    return is_config(cls) and (cls in options or any(is_open(option) and issubclass(cls, option) for option in options))


def choices(annotation: Any) -> dict[str, type]:
    """Returns the config classes that a choice names, by snake_case name; empty when the annotation is no choice."""
    options = members(annotation)
    named = [*filter(is_config, options), *(cls for option in options if is_open(option) for cls in _builtins(option))]
    return {snake_case(cls): cls for cls in named} if len(options) > 1 or any(map(is_open, options)) else {}


@functools.cache
def _builtins(base: type[Extensible]) -> tuple[type, ...]:
    return tuple(map(pkgutil.resolve_name, base.builtins))


def is_choice(annotation: Any) -> bool:
    """Tells whether the class of a value must be named, as the annotation accepts several."""
    return bool(choices(annotation)) or any(map(is_open, members(annotation)))


def choice_name(annotation: Any, cls: type) -> str:
    """Returns the name by which a class is chosen: snake_case, or the import path if only an open base accepts it."""
    return snake_case(cls) if cls in choices(annotation).values() else class_name(cls)


def not_accepted(annotation: Any, cls: type) -> str:
    """Says that `cls` is no value of an annotation, and how to make it one if there is an open base."""
    bases = [class_name(option) for option in members(annotation) if is_open(option)]
    fix = f"; let {cls.__name__} inherit from {bases[0]}" if bases else ""
    return f"expected {describe(annotation)}, found {cls.__name__}{fix}"


def items_of(annotation: Any, count: int) -> tuple[Any, ...] | None:
    """Returns the annotations of `count` items of a tuple annotation, or None when it has another length."""
    args = get_args(annotation)
    if len(args) == 2 and args[1] is Ellipsis:
        return args[:1] * count
    return args if len(args) == count else None


def children(annotation: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, annotation, value) of each part of a node, in order; nothing for a leaf."""
    if is_config(type(value)):
        for field in fields_of(type(value)):
            yield field.name, field.annotation, getattr(value, field.name)
    elif isinstance(value, tuple):
        for index, (item, part) in enumerate(zip(_node_items(annotation, len(value)), value, strict=False)):
            yield str(index), item, part


def walk(
    annotation: Any, value: Any, path: str = "", *, parts_first: bool = False, fingerprinted_only: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (path, annotation, value) of a value, whose path is given, and of everything below it, in field order.

    With `parts_first` the parts of a node come before it; `fingerprinted_only` leaves out what is marked
    `NOT_FINGERPRINTED`, with all that lies below it.
    """
    if fingerprinted_only and any(NOT_FINGERPRINTED in metadata for _, metadata in _alternatives(annotation)):
        return
    if not parts_first:
        yield path, annotation, value
    for name, part_annotation, part in children(annotation, value):
        yield from walk(
            part_annotation, part, join(path, name), parts_first=parts_first, fingerprinted_only=fingerprinted_only
        )
    if parts_first:
        yield path, annotation, value


def is_node(annotation: Any, value: Any) -> bool:
    """Tells whether `value` has parts with paths of their own."""
    return is_config(type(value)) or (isinstance(value, tuple) and bool(_node_items(annotation, len(value))))


def describe(annotation: Any) -> str:
    """Says what an annotation accepts, in the words of the command line: `int at least 1 or none`, `cosine or wsd`."""
    return one_of(words_of(annotation))


def words_of(annotation: Any) -> list[str]:
    """Returns the parts of `describe`: type names, or the words that a closed set consists of."""
    alternatives = dict.fromkeys(_alternatives(annotation))
    return [word for member, metadata in alternatives for word in _words(member, metadata)]


def conform(annotation: Any, value: Any, path: str = "") -> Any:
    """Returns `value` with every leaf of the exact type of its annotation.

    ConfigError where one does not fit; the message has its path, the value and what was expected.
    """
    if accepts(annotation, type(value)):
        parts = (
            (name, part, conform(each, part, join(path, name))) for name, each, part in children(annotation, value)
        )
        changed = {name: new for name, part, new in parts if new is not part}
        return dataclasses.replace(value, **changed) if changed else value
    if is_node(annotation, value) and isinstance(value, tuple):
        parts = children(annotation, value)
        return _same_or(value, tuple(conform(item, part, join(path, name)) for name, item, part in parts))
    found = match(annotation, value)
    if found is MISMATCH:
        plain = value is None or isinstance(value, bool | int | float | str)  # whose text shows the type
        expected = f"expected {describe(annotation)}" if plain else not_accepted(annotation, type(value))
        raise ConfigError(f"{path or 'config'}={show(value)}: {expected}")
    return found


def match(annotation: Any, value: Any) -> Any:
    """Returns a leaf value, of the exact type of the annotation, or `MISMATCH`."""
    options = members(annotation)
    for member in options:
        if (found := _match_member(member, value)) is not MISMATCH:
            return found
    return float(value) if float in options and type(value) is int else MISMATCH


def _match_member(member: Any, value: Any) -> Any:
    if get_origin(member) is tuple:
        items = items_of(member, len(value)) if isinstance(value, tuple) else None
        if items is None:
            return MISMATCH
        parts = tuple(match(item, part) for item, part in zip(items, value, strict=True))
        return MISMATCH if MISMATCH in parts else _same_or(value, parts)
    if get_origin(member) is Literal:
        fits = any(type(value) is type(arg) and value == arg for arg in get_args(member))
    else:
        fits = type(value) is member and not is_config(member)
    return value if fits else MISMATCH


def _same_or(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns `old` itself unless an item differs, so that a tree that conforms comes back as it is."""
    return old if all(one is other for one, other in zip(old, new, strict=True)) else new


def _node_items(annotation: Any, count: int) -> tuple[Any, ...]:
    """Returns the annotations of the items of a tuple of config objects; () when a tuple would be a leaf."""
    for member in members(annotation):
        if get_origin(member) is tuple and any(_classes(arg) for arg in get_args(member)):
            return items_of(member, count) or ()
    return ()


def _classes(annotation: Any) -> list[type]:
    """Returns the config classes and open bases of an annotation, those of tuples included."""
    options = members(annotation)
    inside = (arg for option in options if get_origin(option) is tuple for arg in get_args(option))
    own = [option for option in options if is_config(option) or is_open(option)]
    return [*own, *(cls for arg in inside for cls in _classes(arg))]


def _words(member: Any, metadata: tuple[Any, ...]) -> list[str]:
    if member is bool:
        return ["true", "false"]
    if get_origin(member) is Literal:
        return [arg if isinstance(arg, str) else format_value(arg) for arg in get_args(member)]
    if get_origin(member) is tuple:
        args = get_args(member)
        inside = f"of {describe(args[0])}" if args[1:] == (...,) else f"({', '.join(map(describe, args))})"
        return [f"a tuple {inside}"]
    if is_config(member):
        return [snake_case(member)]
    if is_open(member):
        return [f"MODULE:CLASS (a subclass of {member.__name__})"]
    if issubclass(member, enum.Enum):
        return [item.name for item in member]
    if member is types.NoneType:
        return ["none"]
    limits = ("finite" if bound == math.inf else f"{words} {bound}" for bound, _, words in _limits(metadata))
    return [f"{member.__name__} {' and '.join(limits)}".rstrip()]


def _require_supported(annotation: Any, where: str) -> None:
    for member, metadata in _alternatives(annotation):
        for each in metadata:
            limited = (str,) if isinstance(each, MinLen) else (int, float)
            if each is not NOT_FINGERPRINTED and (type(each) not in _LIMITS or member not in limited):
                words = "Ge, Gt, Le and Lt, of int and float, and MinLen of str"
                raise ConfigError(f"{where}: a config reads {words}; found {each}")
        if get_origin(member) is tuple:
            for arg in get_args(member):
                if arg is not Ellipsis:
                    _require_supported(arg, where)
        elif get_origin(member) is Literal:
            if not all(type(arg) in (str, int, bool, types.NoneType) for arg in get_args(member)):
                raise ConfigError(f"{where}: a Literal may hold str, int, bool and None; found {member}")
        elif not (member in _SCALARS or is_config(member) or is_open(member) or isinstance(member, enum.EnumType)):
            name = member.__name__ if isinstance(member, type) else member
            raise ConfigError(
                f"{where}: a config cannot hold {name}; use int, float, bool, str, None, an enum, a Literal, "
                f"a tuple of these, a dataclass, a base that inherits from Extensible, or a union of such classes"
            )
    classes = [member for member in members(annotation) if is_config(member)]
    if len(choices(annotation)) < len(classes) > 1:
        raise ConfigError(f"{where}: two classes of the union share a snake_case name; rename one of them")
    for cls in choices(annotation).values():
        if KIND in (field.name for field in dataclasses.fields(cls)):
            raise ConfigError(f"{where}: no field of {cls.__qualname__}, a union member, may be named {KIND}")
