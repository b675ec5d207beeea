"""Reads the annotations of config fields.

A *config class* is a dataclass. A *leaf* is an int, float, bool, str, None, enum member, value of a `Literal`, or a
tuple of these. A *node* is a config object, or a non-empty tuple of config objects. A *choice* is a field that accepts
several config classes: the members of a union by snake_case name, the subclasses of an open base (see `Extensible`) by
import path. `Annotated` adds limits of annotated-types, such as `Annotated[int, Ge(1)]`, or `NOT_FINGERPRINTED`.

`conform` gives every value in a config exactly the type of its annotation: an int in a float field becomes a float. The
other modules of this package rely on it.
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

# The test of a value against each kind of limit, and the words for it in messages.
_LIMITS: dict[type, tuple[Callable[[Any, Any], bool], str]] = {
    Ge: (operator.ge, "at least"),
    Gt: (operator.gt, "above"),
    Le: (operator.le, "at most"),
    Lt: (operator.lt, "below"),
    MinLen: (lambda text, length: len(text) >= length, "with characters, at least"),
}
_SCALARS = (bool, int, float, str, types.NoneType)


class _Mark(enum.Enum):  # type checkers understand `is` with an enum member
    MISMATCH = enum.auto()
    NOT_FINGERPRINTED = enum.auto()


NOT_FINGERPRINTED = _Mark.NOT_FINGERPRINTED
"""In `Annotated`: leaves the field, and all fields below it, out of the fingerprint."""

MISMATCH = _Mark.MISMATCH
"""The result of `match` or `parse` if the value does not fit; None may be a valid value."""

MISSING = dataclasses.MISSING  # the default of a field that has none


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """A field of a config class with its resolved annotation."""

    name: str
    annotation: object
    default: object
    factory: Any  # a function, or `MISSING`

    @property
    def required(self) -> bool:
        """Whether the field has no default."""
        return self.default is MISSING and self.factory is MISSING

    def make_default(self) -> object:
        """Returns the default value, or `MISSING`."""
        if self.required:
            return MISSING
        value = self.default if self.factory is MISSING else self.factory()
        return conform(self.annotation, value, self.name)


@functools.cache
def fields_of(cls: type) -> tuple[ConfigField, ...]:
    """Returns the fields that the constructor of `cls` takes.

    Raises ConfigError if an annotation cannot be resolved, or names a type that a config cannot hold.
    """
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError as error:
        raise ConfigError(
            f"{cls.__qualname__}: {cls.__module__} does not define {error.name}, which an annotation names; "
            f"import it there, not under TYPE_CHECKING"
        ) from error
    fields = []
    for field in dataclasses.fields(cls):
        if field.init:
            name, hint = field.name, hints[field.name]
            _require_supported(hint, f"{cls.__qualname__}.{name}")
            fields.append(ConfigField(name=name, annotation=hint, default=field.default, factory=field.default_factory))
    return tuple(fields)


def union_members(annotation: object) -> tuple[Any, ...]:
    """Returns the types of a union without metadata, or the type itself: int and NoneType for `PositiveInt | None`."""
    return tuple(dict.fromkeys(member for member, _ in _alternatives(annotation)))


def _alternatives(annotation: Any, metadata: tuple[object, ...] = ()) -> Iterator[tuple[Any, tuple[object, ...]]]:
    """Yields each type of a union with its metadata, through nested unions and `type` aliases.

    For `Annotated[int, Ge(1)] | None`: `int, (Ge(1),)` and `NoneType, ()`.
    """
    if isinstance(annotation, typing.TypeAliasType):
        yield from _alternatives(annotation.__value__, metadata)
    elif get_origin(annotation) is Annotated:
        yield from _alternatives(annotation.__origin__, (*metadata, *annotation.__metadata__))
    elif get_origin(annotation) in (typing.Union, types.UnionType):
        for part in get_args(annotation):
            yield from _alternatives(part, metadata)
    else:
        yield types.NoneType if annotation is None else annotation, metadata


def is_fingerprinted(annotation: object) -> bool:
    """Tells whether a field with this annotation is part of the fingerprint."""
    return not any(NOT_FINGERPRINTED in metadata for _, metadata in _alternatives(annotation))


def _limits(metadata: Iterable[Any]) -> Iterator[tuple[Any, Callable[[Any, Any], bool], str]]:
    """Yields the bound of each limit, its test of a value and its words: for `Ge(1)` 1, `operator.ge`, "at least"."""
    for each in metadata:
        if type(each) in _LIMITS:
            (bound,) = dataclasses.astuple(each)
            yield bound, *_LIMITS[type(each)]


def within_limits(annotation: object, value: object) -> bool:
    """Tells whether a leaf has an allowed type and lies within its limits; the parts of a node have their own."""
    return is_node(annotation, value) or match(annotation, value, check_limits=True) is not MISMATCH


def smallest_allowed(annotation: object) -> object:
    """Returns the smallest number or the shortest text that an annotation allows, for a message, or `MISSING`."""
    for _, metadata in _alternatives(annotation):
        for limit in metadata:
            if isinstance(limit, Ge):
                return limit.ge
            if isinstance(limit, MinLen):
                return "NAME".ljust(limit.min_length, "_")
    return MISSING


def is_config(cls: object) -> bool:
    """Tells whether `cls` is a config class."""
    return isinstance(cls, type) and dataclasses.is_dataclass(cls)


def is_open(cls: object) -> bool:
    """Tells whether `cls` is an open base: every config class that inherits from it is a valid value."""
    return isinstance(cls, type) and issubclass(cls, Extensible) and not is_config(cls)


def open_bases(annotation: object) -> tuple[type[Extensible], ...]:
    """Returns the open bases in a union."""
    return tuple(member for member in union_members(annotation) if is_open(member))


def accepts(annotation: object, cls: type) -> bool:
    """Tells whether objects of the config class `cls` are values of an annotation."""
    return is_config(cls) and (cls in union_members(annotation) or issubclass(cls, open_bases(annotation)))


def choices(annotation: object) -> dict[str, type]:
    """Returns the config classes of a choice that have snake_case names; imports the `builtins` of open bases."""
    if not is_choice(annotation):
        return {}
    named = [member for member in union_members(annotation) if is_config(member)]
    named += [pkgutil.resolve_name(path) for base in open_bases(annotation) for path in base.builtins]
    return {snake_case(cls): cls for cls in named}


def is_choice(annotation: object) -> bool:
    """Tells whether the class of a value must be named: the annotation has an open base, or a union with a class."""
    options = union_members(annotation)
    return bool(open_bases(annotation)) or (len(options) > 1 and any(is_config(option) for option in options))


def choice_name(annotation: object, cls: type) -> str:
    """Returns the name of a class in a choice: snake_case for a union member or builtin, else the import path."""
    is_builtin = any(class_name(cls) in base.builtins for base in open_bases(annotation))
    return snake_case(cls) if is_builtin or cls in union_members(annotation) else class_name(cls)


def describe_mismatch(annotation: object, cls: type) -> str:
    """Says what an annotation accepts in place of an object of `cls`."""
    bases = open_bases(annotation)
    fix = f"; let {cls.__name__} inherit from {class_name(bases[0])}" if bases else ""
    return f"expected {describe(annotation)}, found {cls.__name__}{fix}"


def item_annotations(annotation: object, count: int) -> tuple[Any, ...] | None:
    """Returns the annotations of the items of a tuple; None if the annotation allows no tuple of `count` items."""
    for member in union_members(annotation):
        if get_origin(member) is tuple:
            args = get_args(member)
            if args[1:] == (...,):  # tuple[int, ...]
                return args[:1] * count
            return args if len(args) == count else None
    return None


def is_node(annotation: object, value: object) -> bool:
    """Tells whether `value` has parts with paths of their own."""
    if isinstance(value, tuple):
        return any(config_classes(item) for item in item_annotations(annotation, len(value)) or ())
    return is_config(type(value))


def children(annotation: object, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name, annotation and value of each part of a node; nothing for a leaf."""
    if not is_node(annotation, value):
        return
    if isinstance(value, tuple):
        items = item_annotations(annotation, len(value)) or ()
        for index, (item, part) in enumerate(zip(items, value, strict=True)):
            yield str(index), item, part
    else:
        for field in fields_of(type(value)):
            yield field.name, field.annotation, getattr(value, field.name)


def walk(
    annotation: object, value: object, path: str = "", *, fingerprinted_only: bool = False
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the path, annotation and value of a node and of everything below it, in the order of the fields.

    `fingerprinted_only` skips fields that are `NOT_FINGERPRINTED`, with everything below them.
    """
    if fingerprinted_only and not is_fingerprinted(annotation):
        return
    yield path, annotation, value
    for name, part_annotation, part in children(annotation, value):
        yield from walk(part_annotation, part, join(path, name), fingerprinted_only=fingerprinted_only)


def describe(annotation: object) -> str:
    """Says what an annotation accepts, such as `int at least 1 or none` or `cosine or wsd`."""
    return one_of(allowed_words(annotation))


def allowed_words(annotation: object) -> list[str]:
    """Returns the alternatives of an annotation as `describe` names them."""
    alternatives = dict.fromkeys(_alternatives(annotation))
    return [word for member, metadata in alternatives for word in _words(member, metadata)]


def conform(annotation: object, value: Any, path: str = "") -> Any:
    """Returns `value` with every leaf in the exact type of its annotation; raises ConfigError if one does not fit."""
    if accepts(annotation, type(value)):
        changed = {}
        for name, part_annotation, part in children(annotation, value):
            if (new := conform(part_annotation, part, join(path, name))) is not part:
                changed[name] = new
        return dataclasses.replace(value, **changed) if changed else value
    if isinstance(value, tuple) and is_node(annotation, value):
        parts = children(annotation, value)
        return _keep_unchanged(value, tuple(conform(item, part, join(path, name)) for name, item, part in parts))
    matched = match(annotation, value)
    if matched is MISMATCH:
        # The text of a scalar shows its type; of other values the message names the class.
        is_scalar = type(value) in _SCALARS
        expected = f"expected {describe(annotation)}" if is_scalar else describe_mismatch(annotation, type(value))
        raise ConfigError(f"{path or 'config'}={show(value)}: {expected}")
    return matched


def match(annotation: object, value: object, *, check_limits: bool = False) -> Any:
    """Returns a leaf value in the exact type of the annotation, or `MISMATCH`.

    With `check_limits`, a value outside the limits of the annotation does not match.
    """
    alternatives = list(_alternatives(annotation))
    for member, metadata in alternatives:
        limits = _limits(metadata) if check_limits else ()
        matched = _match_member(member, value, check_limits)
        if matched is not MISMATCH and all(test(matched, bound) for bound, test, _ in limits):
            return matched
    # An int becomes a float only where no type of the union takes it as it is.
    if type(value) is int and any(member is float for member, _ in alternatives):
        try:
            return match(annotation, float(value), check_limits=check_limits)
        except OverflowError:  # more than 308 digits
            return MISMATCH
    return MISMATCH


def _match_member(member: object, value: object, check_limits: bool) -> object:
    """Does what `match` does for one type of a union, but leaves the limits of the type itself to the caller."""
    if get_origin(member) is tuple and isinstance(value, tuple):
        items = item_annotations(member, len(value))
        if items is None:
            return MISMATCH
        parts = tuple(match(item, part, check_limits=check_limits) for item, part in zip(items, value, strict=True))
        return MISMATCH if MISMATCH in parts else _keep_unchanged(value, parts)
    if get_origin(member) is Literal:
        fits = any(type(value) is type(arg) and value == arg for arg in get_args(member))  # True is not 1
    else:
        fits = type(value) is member and not is_config(member)
    return value if fits else MISMATCH


def _keep_unchanged(old: tuple[object, ...], new: tuple[object, ...]) -> tuple[object, ...]:
    """Returns `old` itself if no item differs, so that a config that conforms is returned unchanged."""
    return old if all(one is other for one, other in zip(old, new, strict=True)) else new


def config_classes(annotation: object) -> list[type]:
    """Returns the config classes and open bases in an annotation, also inside tuples."""
    classes = []
    for member in union_members(annotation):
        if is_config(member) or is_open(member):
            classes.append(member)
        elif get_origin(member) is tuple:
            classes += [cls for arg in get_args(member) for cls in config_classes(arg)]
    return classes


def _words(member: Any, metadata: tuple[object, ...]) -> list[str]:
    """Returns the words for one type of a union: several for a bool, a Literal, an enum or an open base."""
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
        names = (snake_case(path.partition(":")[2]) for path in member.builtins)  # without importing them
        return [*names, f"MODULE:CLASS (a subclass of {member.__name__})"]
    if issubclass(member, enum.Enum):
        return [item.name for item in member]
    if member is types.NoneType:
        return ["none"]
    limits = ("finite" if bound == math.inf else f"{words} {bound}" for bound, _, words in _limits(metadata))
    return [f"{member.__name__} {' and '.join(limits)}".rstrip()]


def _require_supported(annotation: object, where: str) -> None:
    """Raises ConfigError if a field, `Class.name` for the message, has an annotation that a config cannot hold."""
    for member, metadata in _alternatives(annotation):
        for each in metadata:
            limited = (str,) if isinstance(each, MinLen) else (int, float)
            if each is not NOT_FINGERPRINTED and (type(each) not in _LIMITS or member not in limited):
                allowed = "Ge, Gt, Le and Lt of int and float, and MinLen of str"
                raise ConfigError(f"{where}: {each} is not a limit that a config checks; use {allowed}")
        if get_origin(member) is tuple:
            for arg in get_args(member):
                if arg is not Ellipsis:
                    _require_supported(arg, where)
        elif get_origin(member) is Literal:
            if not all(type(arg) in (str, int, bool, types.NoneType) for arg in get_args(member)):
                raise ConfigError(f"{where}: {member} must consist of str, int, bool and None")
        elif not (member in _SCALARS or is_config(member) or is_open(member) or isinstance(member, enum.EnumType)):
            name = member.__name__ if isinstance(member, type) else member
            raise ConfigError(
                f"{where}: a config cannot hold {name}; use int, float, bool, str, None, an enum, a Literal, "
                f"a tuple of these, a dataclass, a base that inherits from Extensible, or a union of such classes"
            )
    options = union_members(annotation)
    if sum(get_origin(option) is tuple for option in options) > 1:
        raise ConfigError(f"{where}: a union can have only one tuple type; use a tuple of a union")
    classes = [option for option in options if is_config(option)] if is_choice(annotation) else []
    if len(set(map(snake_case, classes))) < len(classes):
        raise ConfigError(f"{where}: two classes of the union share a snake_case name; rename one of them")
    for cls in classes:
        if KIND in (field.name for field in dataclasses.fields(cls)):
            raise ConfigError(f"{where}: {cls.__qualname__}, in the union, has a field {KIND}; rename the field")
