"""Writes a config as the Python source of a config file."""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from jaxinfra.config.schema import fields_of, is_config
from jaxinfra.config.text import join, same

_LINE_LENGTH = 110


def source_code(
    config: object, description: str, *, always: Collection[str] = (), comments: Mapping[str, str] | None = None
) -> str:
    """Returns a config file with `config()` that returns `config`; fields with their default values are left out.

    Args:
        config: the config.
        description: the docstring of the file.
        always: paths of fields that are written with their default values, too.
        comments: comments by the path of the field that they follow.
    """
    imports: dict[str, set[str]] = {}
    statement = "    return "
    writer = _Writer(imports=imports, always=always, comments=comments or {})
    expression = writer.expression(config, "", indent=4, column=len(statement))
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    header = [f'"""{description}"""', "", *lines, "", "", f"def config() -> {type(config).__name__}:"]
    return "\n".join(header) + f"\n{statement}{expression}\n"


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes expressions.

    Attributes:
        imports: names to import by module; the classes of the written values are added.
        always: as in `source_code`.
        comments: as in `source_code`.
    """

    imports: dict[str, set[str]]
    always: Collection[str]
    comments: Mapping[str, str]

    def expression(self, value: object, path: str, *, indent: int, column: int) -> str:
        """Returns the Python expression of a value, broken over lines if it is too long or has a comment inside.

        Args:
            value: a config object or a leaf.
            path: the path of the value.
            indent: spaces before the line on which the expression starts.
            column: characters before the expression on that line.
        """
        if is_config(type(value)):
            self.imports.setdefault(type(value).__module__, set()).add(type(value).__name__)
            parts = [(f"{name}=", join(path, name), part) for name, part in self._fields(value, path)]
            opening = f"{type(value).__name__}("
        elif isinstance(value, tuple) and any(is_config(type(item)) for item in value):
            opening, parts = "(", [("", join(path, str(index)), item) for index, item in enumerate(value)]
        else:
            return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
        inner = indent + 4
        texts = [
            prefix + self.expression(part, part_path, indent=inner, column=inner + len(prefix))
            for prefix, part_path, part in parts
        ]
        comments = [self.comments.get(part_path) for _, part_path, _ in parts]
        trailing_comma = "," if opening == "(" and len(texts) == 1 else ""
        one_line = f"{opening}{', '.join(texts)}{trailing_comma})"
        if not any(comments) and "\n" not in one_line and column + len(one_line) + len(",") <= _LINE_LENGTH:
            return one_line
        lines = (
            f"{' ' * inner}{text},{f'  # {comment}' if comment else ''}\n"
            for text, comment in zip(texts, comments, strict=True)
        )
        return f"{opening}\n{''.join(lines)}{' ' * indent})"

    def _fields(self, config: object, path: str) -> Iterator[tuple[str, object]]:
        """Yields the fields that are written."""
        for field in fields_of(type(config)):
            value, default = getattr(config, field.name), field.make_default()
            unchanged = value == default if is_config(type(value)) else same(value, default)
            if not unchanged or join(path, field.name) in self.always:
                yield field.name, value
