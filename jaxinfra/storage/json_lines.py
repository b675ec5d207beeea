"""Reads files with a JSON object on each line, as a kill, a bad disk or another version may have left them.

A line that cannot be used costs no other line, and no run.
"""

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from jaxinfra.storage.errors import storage_errors

_MAX_INTEGER = 1 << 63

_log = logging.getLogger(__name__)


def read_json_lines[T](path: Path, parse: Callable[[dict[str, Any]], T | None]) -> list[T]:
    """Returns what `parse` makes of the object on each line; raises StorageError if the file cannot be read.

    Leaves out lines without an object and those for which `parse` returns None. One warning names the first of them and
    says how many there are; it does not count what stands after the last newline, which a kill has torn.
    """
    with storage_errors(path, action="read", fix="use the directory of a run that has started"):
        content = path.read_bytes()
    lines, rows, bad = content.split(b"\n"), [], []
    for number, line in enumerate(lines, 1):
        value = parse_json(line)
        row = parse(value) if isinstance(value, dict) else None
        if row is not None:
            rows.append(row)
        elif line and number < len(lines):
            bad.append(number)
    if bad:
        _warn(f"{path}:{bad[0]}: cannot be used; {len(bad)} of {len(lines) - 1} lines are damaged and left out")
    return rows


def parse_json(text: bytes) -> object:
    """Parses JSON; returns None if it is damaged, nested too deeply, or a number in it has too many digits."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number, which may be NaN or infinite; integers are below 2**63."""
    return type(value) is float or is_integer(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer below 2**63; a boolean is none."""
    return type(value) is int and abs(value) < _MAX_INTEGER


@functools.cache
def _warn(text: str) -> None:
    """Warns once in a process: the report of a run is written again and again."""
    _log.warning(text)
