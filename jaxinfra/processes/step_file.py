"""Tells the supervisor how far the training is: the first and the last step that this start has completed.

They are in a file of the supervisor, which is there however the process ends, and whatever its run directory is.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

VARIABLE = "JAXINFRA_STEP_FILE"
"""Environment variable with the path of the file."""
_FORMAT = "<qq"


class Steps(NamedTuple):
    """The steps that one start has completed, counted from 1; None if it has completed none."""

    first: int | None = None
    last: int | None = None


class StepWriter:
    """Writes the steps of this process; does nothing without a supervisor, or in what this process starts."""

    def __init__(self) -> None:
        path = os.environ.pop(VARIABLE, None)
        self._file = None if path is None else os.open(path, os.O_WRONLY)
        self._first = 0

    def complete(self, step: int) -> None:
        """Records a completed step."""
        if self._file is not None:
            self._first = self._first or step
            os.pwrite(self._file, struct.pack(_FORMAT, self._first, step), 0)


def reset_steps(path: Path) -> None:
    """Creates the file for the next start, or empties it."""
    path.write_bytes(struct.pack(_FORMAT, 0, 0))


def read_steps(path: Path) -> Steps:
    """Returns what a start has written."""
    first, last = struct.unpack(_FORMAT, path.read_bytes())
    return Steps(first, last) if first else Steps()
