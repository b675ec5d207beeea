"""Reads files with a JSON object on each line, as a kill, a bad disk or another version may have left them.

A line that cannot be used costs no other line, and no run.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from jaxinfra.storage.atomic import read_file, write_bytes_atomic
from jaxinfra.storage.errors import storage_errors

_log = logging.getLogger(__name__)
_warned: set[tuple[Path, int]] = set()


def read_json_lines[T](path: Path, parse: Callable[[Any], T | None]) -> list[T]:
    """Returns what `parse` makes of the value on each line; raises StorageError if the file cannot be read.

    Leaves out lines that are no JSON, and those for which `parse` returns None. One warning in a process names the
    first of them and counts all; what stands after the last newline does not count, as a kill has torn it.
    """
    return [row for row, _ in _parse_lines(path, parse)]


def truncate_json_lines[T](path: Path, parse: Callable[[Any], T | None], keep: Callable[[T], bool]) -> list[T]:
    """Drops the lines that `read_json_lines` leaves out, and rows that are not to be kept; returns the others.

    The file is a new one: what a start that has lost the run still appends goes to the old one.
    """
    if not path.exists():
        return []
    kept = [(row, line) for row, line in _parse_lines(path, parse) if keep(row)]
    with storage_errors(path):
        write_bytes_atomic(path, b"".join(line + b"\n" for _, line in kept))
    return [row for row, _ in kept]


def _parse_lines[T](path: Path, parse: Callable[[Any], T | None]) -> list[tuple[T, bytes]]:
    with storage_errors(path, action="read", fix="use the directory of a run that has started"):
        lines = read_file(path).split(b"\n")
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        if (row := parse(parse_json(line))) is not None:
            rows.append((row, line))
        elif line and number < len(lines):
            bad.append(number)
    if bad and (path, bad[0]) not in _warned:
        _warned.add((path, bad[0]))
        _log.warning("%s:%d: damaged; %d of %d lines are left out", path, bad[0], len(bad), len(rows) + len(bad))
    return rows


def parse_json(text: bytes) -> Any:
    """Parses JSON; returns None if it is damaged, nested too deeply, or has half of a surrogate pair."""
    try:
        value = json.loads(text)
        if b"\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # as the report will
    except (ValueError, RecursionError):  # also of a number with too many digits
        return None
    return value


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a float, which may be NaN or infinite, or an integer of 64 bits."""
    return type(value) is float or is_integer(value)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of 64 bits, and no boolean."""
    return type(value) is int and abs(value) < 1 << 63
