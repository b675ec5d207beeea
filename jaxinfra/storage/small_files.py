"""Small files that a recipe names: a tokenizer, a template. They are read whole, from any place that fsspec knows."""

import fsspec

from jaxinfra.errors import ConfigError


def read_content(path: str, what: str) -> bytes:
    """The bytes of a file.

    Args:
        path: of the file, or its URL.
        what: it should be, for the error.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        system, place = fsspec.url_to_fs(path)
        return system.cat_file(place)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(path, what, error) from error


def exists(path: str) -> bool:
    """Whether there is such a file.

    Raises:
        ConfigError: its place cannot be looked at.
    """
    try:
        system, place = fsspec.url_to_fs(path)
        return system.exists(place)
    except (OSError, ValueError, ImportError) as error:
        raise _unreadable(path, "a file", error) from error


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())


def _unreadable(path: str, what: str, error: Exception) -> ConfigError:
    cause = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
    return ConfigError(f"{path}: cannot be read as {what} ({cause}); check the path")
