"""Turns exceptions from a user's code into one-line errors that name their file and line."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from jaxinfra.errors import ConfigError, JaxinfraError

_NOT_USERS = (Path(__file__).resolve().parent, Path(traceback.__file__).resolve().parent)  # jaxinfra, Python's library
INSTALLED = frozenset({"site-packages", "dist-packages"})
"""Names of the folders of installed packages; Debian's Python has the second one."""


@contextmanager
def user_code_errors(owner: type, path: str) -> Iterator[None]:
    """Converts exceptions from a user's class, at `path` in the config, to ConfigError.

    The message shows the innermost line in a user's file, not in JAX or this package. Exceptions from classes of this
    package, and errors that are already meant for the user, pass unchanged.
    """
    try:
        yield
    except JaxinfraError:
        raise
    except Exception as error:
        if owner.__module__.partition(".")[0] == "jaxinfra":
            raise
        place = innermost_place(error) or owner.__qualname__
        reason = " ".join(str(error).split())
        raise ConfigError(
            # The message is one line, but an error of JAX may have hundreds.
            f"{place}: {type(error).__name__}: {reason[:300]}; fix {owner.__qualname__}, the {path} of the config"
        ) from error


class Ending(NamedTuple):
    """How a program ends: its exit code, and the line that says why."""

    code: int
    line: str


def ending_of(error: BaseException | None) -> Ending:
    """Returns how an exception ends the program; code 0 without one."""
    text = "" if error is None else " ".join(str(error).split())
    match error:
        case None | SystemExit(code=None):
            return Ending(0, "")
        case JaxinfraError():
            return Ending(error.exit_code, text)
        case KeyboardInterrupt():
            return Ending(130, "interrupted")  # as shells report SIGINT: 128 + 2
        case SystemExit(code=int(code)):
            return Ending(code & 0xFF, f"ended with exit code {code & 0xFF}")  # the system keeps 8 bits
        case SystemExit():
            return Ending(1, text)
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = innermost_place(error)
    if place is None and is_out_of_memory(error):
        fix = "use a smaller batch, shorter sequences or a smaller model"
        return Ending(ConfigError.exit_code, f"out of memory: {named[:300]}; {fix}")
    return Ending(1, named) if place is None else Ending(ConfigError.exit_code, f"{place}: {named}; fix this line")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that JAX or Python has found no memory, on a device or on the host."""
    is_jax = type(error).__name__ == "JaxRuntimeError"  # its class is not imported here: this module is below JAX
    return isinstance(error, MemoryError) or (is_jax and "RESOURCE_EXHAUSTED" in str(error))


def innermost_place(error: BaseException) -> str | None:
    """Returns the innermost `FILE:LINE` of a traceback in a user's file; None if it is all in packages."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):  # from the outermost call to the innermost
        if _is_users(frame.f_code.co_filename):
            place = f"{frame.f_code.co_filename}:{line}"
    return place


def user_modules() -> dict[str, str]:
    """Returns the files of the modules that have been imported from files of the user, by module."""
    files = {name: getattr(module, "__file__", None) for name, module in [*sys.modules.items()]}
    return {name: file for name, file in files.items() if file and _is_users(file)}


def _is_users(file: str) -> bool:
    """Tells whether a file is a user's: not of jaxinfra, Python or an installed package."""
    if file.startswith("<"):  # such as "<frozen importlib._bootstrap>"
        return False
    resolved = Path(file).resolve()
    return not any(map(resolved.is_relative_to, _NOT_USERS)) and INSTALLED.isdisjoint(resolved.parts)
