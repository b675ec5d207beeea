"""Passes messages between a training and its supervisor, in files of the supervisor.

The training says how far it is: the first and the last step that this start has completed. The file is there however
the process ends. The supervisor of an elastic run says when to leave, so that more hosts can join.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

VARIABLE = "JAXINFRA_STEP_FILE"
"""Environment variable with the path of the file."""
ROUND = "JAXINFRA_ROUND"
"""Environment variable with the number of a start of an elastic run, counted from 1, in all its processes."""
_FORMAT = "<qq"


class Steps(NamedTuple):
    """The steps that one start has completed, counted from 1; None if it has completed none."""

    first: int | None = None
    last: int | None = None


class StepWriter:
    """Writes the steps of this process; does nothing without a supervisor, or in what this process starts."""

    def __init__(self) -> None:
        self._path = path = os.environ.pop(VARIABLE, None)
        self._file = None if path is None else os.open(path, os.O_WRONLY)
        self._first = 0

    def complete(self, step: int) -> None:
        """Records a completed step."""
        if self._file is not None:
            self._first = self._first or step
            os.pwrite(self._file, struct.pack(_FORMAT, self._first, step), 0)

    @property
    def is_asked_to_leave(self) -> bool:
        """Whether the supervisor has asked this process to leave after a checkpoint."""
        return self._path is not None and leave_file(self._path).exists()


def leave_file(path: str | Path) -> Path:
    """Returns the file that is there once a training is asked to leave, by the path of its steps."""
    return Path(f"{path}.leave")


def round_number() -> int:
    """Returns which start of an elastic run this process belongs to; 0 for other runs."""
    return int(os.environ.get(ROUND, 0))


def reset_steps(path: Path) -> None:
    """Creates the file for the next start, or empties it; nobody is asked to leave."""
    leave_file(path).unlink(missing_ok=True)
    path.write_bytes(struct.pack(_FORMAT, 0, 0))


def read_steps(path: Path) -> Steps:
    """Returns what a start has written."""
    first, last = struct.unpack(_FORMAT, path.read_bytes())
    return Steps(first, last) if first else Steps()
