"""What every refusal has: an exit code, one line that names the field or file, and a suggestion that works.

Tests name fields, files and values; how the sentence puts them is free.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from jaxinfra.config import validate
from jaxinfra.errors import ConfigError, JaxinfraError, Preempted
from jaxinfra.run import with_mesh_size


def names(line: str, *named: str) -> str:
    """Asserts that a message is one line with each of these words in it; returns it."""
    assert line and "\n" not in line, line
    missing = [word for word in " ".join(named).split() if word not in line]
    assert not missing, f"{missing} not in: {line}"
    return line


@contextmanager
def raises(kind: type[Exception], *named: str) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expects an error of exactly this class, of one line with these words."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.type is kind
    names(str(caught.value), *named)


def preempted(ended: Any, *named: str) -> str:
    """Asserts that a command was stopped and has saved: exit code 75 and one line, which is no error; returns it."""
    assert ended.code == Preempted.exit_code and not ended.err.startswith("error"), ended
    return names(ended.err.removesuffix("\n"), *named)


def refused(ended: Any, *named: str, code: int = ConfigError.exit_code) -> str:
    """Asserts that a command printed one line with these words and left with `code`; returns the line."""
    assert ended.code == code, ended
    assert ended.err.startswith("error: ") and ended.err.endswith("\n"), ended.err
    return names(ended.err.removeprefix("error: ").removesuffix("\n"), *named)


def problem(config: Any, *named: str, kind: type[JaxinfraError] = ConfigError) -> str:
    """Asserts that validation refuses a config in one line with these words; returns the line."""
    with raises(kind, *named) as caught:
        validate(config)
    return str(caught.value)


def suggested(line: str) -> list[str]:
    """The overrides that a message suggests: of "use a=1 b=2, or ..." the first alternative."""
    found = re.search(r"; use ((?:[\w.]+=\S+ ?)+)", line)
    assert found, line
    return [each.rstrip(",") for each in found[1].split()]


def mended(overrides: Sequence[str], line: str) -> list[str]:
    """The overrides, changed by those that a message suggests."""
    pairs = (each.split("=", 1) for each in (*overrides, *suggested(line)))
    return [f"{path}={value}" for path, value in dict(pairs).items()]


def mend(tiny: Any, overrides: Sequence[str], line: str, *, most: int = 1, devices: int = 8) -> list[str]:
    """Applies what a message suggests, and what the next one does; a start on so many devices then validates.

    Args:
        most: messages after which the overrides must do; 1 if the first suggestion must.
    """
    for left in reversed(range(most)):
        overrides = mended(overrides, line)
        try:
            validate(run := tiny.loaded(*overrides))
            validate(with_mesh_size(run, devices))
            break
        except ConfigError as error:
            assert left, error
            line = str(error)
    return list(overrides)
