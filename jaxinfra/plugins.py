"""Finds what other installed packages add to this one, by their entry points.

A package declares them in its `pyproject.toml`, as for other programs that take plugins:

    [project.entry-points."jaxinfra.commands"]
    hello = "my_package:HELLO"

The groups are `jaxinfra.commands`, `jaxinfra.families` and `jaxinfra.schedulers`. An entry point is imported when it is
needed, and not before.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from jaxinfra.errors import ConfigError


@cache
def plugins(group: str) -> dict[str, EntryPoint]:
    """Returns the entry points of a group, such as "commands", by name."""
    return {entry.name: entry for entry in entry_points(group=f"jaxinfra.{group}")}


def load_plugin[T](group: str, name: str, kind: type[T]) -> T:
    """Imports an entry point; ConfigError names its package if that fails, or if it is no instance of `kind`."""
    entry = plugins(group)[name]
    where = f"entry point {name!r} of jaxinfra.{group} in package {entry.dist.name if entry.dist else '?'}"
    try:
        found = entry.load()
    except Exception as error:
        raise ConfigError(
            f"{where}: {type(error).__name__}: {error}; mend {entry.value}, or uninstall the package"
        ) from error
    if not isinstance(found, kind):
        raise ConfigError(f"{where}: {entry.value} is {type(found).__name__}; make it a {kind.__name__}")
    return found
