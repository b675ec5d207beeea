"""Writes a config as the Python source of a config file."""

import json
from collections.abc import Iterator

from jaxinfra.config.schema import fields_of, is_config
from jaxinfra.config.text import same

_LINE_LENGTH = 110


def source_code(config: object, description: str) -> str:
    """Returns a config file with `config()` that returns `config`; fields with their default values are left out."""
    imports: dict[str, set[str]] = {}
    statement = "    return "
    expression = _expression(config, imports, indent=4, column=len(statement))
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items())]
    header = [f'"""{description}"""', "", *lines, "", "", f"def config() -> {type(config).__name__}:"]
    return "\n".join(header) + f"\n{statement}{expression}\n"


def _expression(value: object, imports: dict[str, set[str]], *, indent: int, column: int) -> str:
    """Returns the Python expression of a value, broken over lines if it is too long.

    Args:
        value: a config object or a leaf.
        imports: names to import by module; the classes of the value are added.
        indent: spaces before the line on which the expression starts.
        column: characters before the expression on that line.
    """
    if is_config(type(value)):
        imports.setdefault(type(value).__module__, set()).add(type(value).__name__)
        opening, parts = f"{type(value).__name__}(", [(f"{name}=", part) for name, part in _changed_fields(value)]
    elif isinstance(value, tuple) and any(is_config(type(item)) for item in value):
        opening, parts = "(", [("", item) for item in value]
    else:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    inner = indent + 4
    texts = [prefix + _expression(part, imports, indent=inner, column=inner + len(prefix)) for prefix, part in parts]
    trailing_comma = "," if opening == "(" and len(texts) == 1 else ""
    one_line = f"{opening}{', '.join(texts)}{trailing_comma})"
    if "\n" not in one_line and column + len(one_line) + len(",") <= _LINE_LENGTH:
        return one_line
    lines = "".join(f"{' ' * inner}{text},\n" for text in texts)
    return f"{opening}\n{lines}{' ' * indent})"


def _changed_fields(config: object) -> Iterator[tuple[str, object]]:
    for field in fields_of(type(config)):
        value, default = getattr(config, field.name), field.make_default()
        unchanged = value == default if is_config(type(value)) else same(value, default)
        if not unchanged:
            yield field.name, value
