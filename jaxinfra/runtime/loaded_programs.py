"""Tells the launcher which compiled programs a process took from the compile cache since it last completed a step.

An intact program may still kill the process that runs it, at every start: one that was compiled on another CPU, or by a
compiler with a bug. Then the launcher deletes these programs, and the next start compiles them anew.
"""

import os
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "JAXINFRA_LOADED_PROGRAMS"
"""Environment variable with the path of the list, one program a line; it need not exist."""
CRASHES = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"})
"""Signals that a program brings about; all others come from outside of the process."""


def add(location: str) -> None:
    """Lists a program by its path or URL; does nothing without a launcher."""
    if path := os.environ.get(VARIABLE):
        with open(path, "a") as file:
            file.write(f"{location}\n")


def trust_all() -> None:
    """Removes the list, after a step."""
    if path := os.environ.get(VARIABLE):
        Path(path).unlink(missing_ok=True)


def delete_all(lists: Iterable[Path]) -> list[str]:
    """Deletes the programs of lists, and returns their paths or URLs; raises StorageError if that fails."""
    from jaxinfra.storage.objects import ObjectStore

    locations = sorted({location for path in lists if path.exists() for location in path.read_text().splitlines()})
    for location in locations:
        folder, _, name = location.rpartition("/")
        ObjectStore(folder).delete(name)
    return locations
