"""Prints lines about places on the terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from jaxinfra.command import command_line


def say(text: str) -> None:
    """Prints a line about the place, apart from what the run prints."""
    print(f"place {time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


@contextmanager
def watching(location: str) -> Iterator[None]:
    """Ctrl-C leaves the run alone, and says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        again, end = command_line("runs", "resume", location), command_line("runs", "stop", location)
        say(f"left; what was started goes on. {again} watches it, {end} ends it")
        sys.exit(130)  # as shells report SIGINT
