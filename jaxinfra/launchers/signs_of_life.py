"""Tells by this host's own clock which hosts are alive, from files that they rewrite. Imports no JAX."""

import math
import time
from collections.abc import Sequence


class Signs:
    """Says by this host's clock which files show signs of life: those that change, and those that are new."""

    def __init__(self, dead_s: float) -> None:
        self._dead_s = dead_s
        self._seen: dict[str, tuple[int, float]] = {}  # the last beat of a file, and when it was first seen
        self._looked = set[int | str]()  # what was looked for
        self._old: dict[str, float] = {}  # files of the first look, and when that was

    def look(self, what: int | str, names: Sequence[str]) -> None:
        """Records what is there, or should be, at the first look for something: maybe what dead hosts have left."""
        if what not in self._looked:
            self._looked.add(what)
            self._old |= dict.fromkeys(names, time.monotonic())

    def is_alive(self, name: str, beat: int, dead_s: float | None = None) -> bool:
        """Whether a file is new, or has changed lately."""
        now_s = time.monotonic()
        old, since_s = self._seen.get(name, (beat, -math.inf if name in self._old else now_s))
        if old != beat:
            since_s = now_s
        self._seen[name] = beat, since_s
        return now_s - since_s < (dead_s or self._dead_s)

    def is_watched(self, name: str, dead_s: float) -> bool:
        """Whether it was watched for long enough to say that it is dead."""
        return time.monotonic() - self._old[name] >= dead_s
