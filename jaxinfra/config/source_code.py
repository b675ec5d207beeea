"""Writes a config as the Python source of a config file."""

import json
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from jaxinfra.config.schema import fields_of, is_config
from jaxinfra.config.text import join, same

_LINE_LENGTH = 110  # characters of a written line, to which a comment at its end is added


def source_code(
    config: object, description: str, *, always: Collection[str] = (), comments: Mapping[str, str] | None = None
) -> str:
    """Returns a config file with `description` as its docstring, and `config()` that returns `config`.

    Fields with their default values are left out, but for the paths in `always`. `comments` follow the fields at
    their paths.
    """
    writer = _Writer(always=always, comments=comments or {})
    statement = writer.write("return ", config, path="", indent=4)
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(writer.imports.items())]
    header = [f'"""{description}"""', "", *lines, "", "", f"def config() -> {type(config).__name__}:"]
    return "\n".join(header) + f"\n    {statement}\n"


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes expressions, and collects the names that a file with them has to import."""

    always: Collection[str]  # as in `source_code`
    comments: Mapping[str, str]  # as in `source_code`
    imports: dict[str, set[str]] = field(default_factory=dict)  # module -> names

    def write(self, prefix: str, value: object, *, path: str, indent: int) -> str:
        """Returns a prefix, such as `name=`, and the Python expression of the value at `path`.

        They start a line after `indent` spaces. An expression that is too long, or has a comment inside, takes several.
        """
        if is_config(type(value)):
            self.imports.setdefault(_module_of(type(value)), set()).add(type(value).__name__)
            opening = f"{type(value).__name__}("
        elif isinstance(value, tuple) and any(is_config(type(item)) for item in value):
            opening = "("
        else:
            return prefix + (json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value))
        inner = indent + 4
        texts, comments = [], []
        for part_prefix, part_path, part in self._parts(value, path):
            texts.append(self.write(part_prefix, part, path=part_path, indent=inner))
            comments.append(self.comments.get(part_path))
        trailing_comma = "," if opening == "(" and len(texts) == 1 else ""  # makes a tuple of one item
        one_line = f"{prefix}{opening}{', '.join(texts)}{trailing_comma})"
        if not any(comments) and "\n" not in one_line and indent + len(one_line) + len(",") <= _LINE_LENGTH:
            return one_line
        lines = (
            f"{' ' * inner}{text},{f'  # {comment}' if comment else ''}\n"
            for text, comment in zip(texts, comments, strict=True)
        )
        return f"{prefix}{opening}\n{''.join(lines)}{' ' * indent})"

    def _parts(self, value: object, path: str) -> Iterator[tuple[str, str, object]]:
        """Yields the prefix, path and value of each part that is written."""
        if isinstance(value, tuple):
            yield from (("", join(path, index), item) for index, item in enumerate(value))
            return
        for each in fields_of(type(value)):
            part, part_path, default = getattr(value, each.name), join(path, each.name), each.make_default()
            is_default = part == default if is_config(type(part)) else same(part, default)
            if not is_default or part_path in self.always:
                yield f"{each.name}=", part_path, part


def _module_of(cls: type) -> str:
    """Returns the module to import a class from: the package around its own one, if that has imported it."""
    package = cls.__module__.rpartition(".")[0]
    is_there = "." in package and vars(sys.modules[package]).get(cls.__name__) is cls
    return package if is_there else cls.__module__
