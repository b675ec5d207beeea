"""Named places in the code where a test makes a run fail, such as in the middle of a save. Imports no JAX.

JAXINFRA_FAIL=POINT:RANK:STEP:ACTION, several with commas between, arms them; without it they cost a lookup. RANK is the
number of a process; it and STEP may be `*` for any. If JAXINFRA_FAIL_LOG names a folder, an action is logged there
first: as a file `POINT:RANK:STEP:ACTION`, and as one with `@` and the rank at the end. So a test can tell that it did
happen. With a log, an action at a given step happens only once in each rank, even if the run is started again.

    JAXINFRA_FAIL_LOG=/tmp/fired JAXINFRA_FAIL=save.write:1:20:kill python -m launch CONFIG --processes 2 --supervise
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from jaxinfra.errors import ConfigError

POINTS = {
    "init": "before the parameters are initialized",
    "restore": "after a checkpoint was verified, before it is read",
    "compile": "before the train step is compiled",
    "step": "after a step was dispatched, while the devices compute it",
    "data": "in the thread that reads a batch",
    "log": "before metrics are written",
    "evaluation": "after the first batch of an evaluation",
    "save.copy": "while a save blocks the training, to copy the arrays",
    "save.write": "in the background, before the files of a checkpoint are complete",
    "save.manifest": "after the last file, before the manifest",
    "save.delete": "after a checkpoint is complete, before an older one is deleted",
    "save.deleting": "in the middle of a deletion",
    "export": "in `hub export`, before a file of weights is complete; its number stands for the step",
    "promote": "in `model promote`: 1 before the version is registered, 2 before the alias moves, 3 after that",
    "end": "after the last checkpoint, before summary.json",
}
"""Where each failpoint is."""

ACTIONS = ("kill", "stop", "term", "raise", "enospc", "edquot", "oom", "sleep=SECONDS")
_MAX_BYTES, _BLOCK_BYTES = 4 << 30, 16 << 20  # `oom` takes up to 4 GiB, in blocks of 16 MiB
_VARIABLE, _LOG = "JAXINFRA_FAIL", "JAXINFRA_FAIL_LOG"


class Failpoint(NamedTuple):
    """An armed failpoint; `rank` and `step` are None for any."""

    point: str
    rank: int | None
    step: int | None
    action: str

    def __str__(self) -> str:
        numbers = ("*" if number is None else str(number) for number in (self.rank, self.step))
        return ":".join((self.point, *numbers, self.action))


def parse_failpoints(text: str) -> list[Failpoint]:
    """Parses the value of JAXINFRA_FAIL; raises ConfigError."""
    return [_parse(each) for each in text.split(",") if each]


def _parse(text: str) -> Failpoint:
    point, *numbers, action = text.split(":") if text.count(":") == 3 else ("", "", "", "")  # no known point: refused
    kind, _, seconds = action.partition("=")
    is_known = action in ACTIONS or (kind == "sleep" and seconds.replace(".", "", 1).isdecimal())
    if point not in POINTS or not is_known or not all(each == "*" or each.isdecimal() for each in numbers):
        raise ConfigError(
            f"{_VARIABLE}={text}: expected POINT:RANK:STEP:ACTION with a point of {', '.join(POINTS)} and an action of "
            f"{', '.join(ACTIONS)}; use {_VARIABLE}=step:0:20:kill, or unset it"
        )
    rank, step = (None if each == "*" else int(each) for each in numbers)
    return Failpoint(point=point, rank=rank, step=step, action=action)


def check_environment(environment: Mapping[str, str]) -> None:
    """Creates the folder of JAXINFRA_FAIL_LOG; raises ConfigError if that fails, or if JAXINFRA_FAIL is wrong."""
    if parse_failpoints(environment.get(_VARIABLE, "")) and (folder := environment.get(_LOG)):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{_LOG}={folder}: {error.strerror}; name a folder that can be written") from None


def failpoint(point: str, step: int) -> None:
    """Runs the action that is armed for this point, if any; `step` is the number of completed steps here."""
    if _VARIABLE not in os.environ:
        return
    for armed in parse_failpoints(os.environ[_VARIABLE]):
        if armed.point == point and armed.rank in (None, _rank()) and armed.step in (None, step) and _log_action(armed):
            _act(armed, step)


def _rank() -> int:
    jax = sys.modules.get("jax")  # JAX numbers the processes; before it is imported, a process counts as rank 0
    return 0 if jax is None else jax.process_index()


def _log_action(armed: Failpoint) -> bool:
    """Logs that a failpoint acts in this rank; returns False if it has acted here before, and may act only once."""
    if folder := os.environ.get(_LOG):
        try:
            Path(folder, f"{armed}@{_rank()}").touch(exist_ok=armed.step is None)
        except FileExistsError:
            return False
        Path(folder, str(armed)).touch()
    return True


def _act(armed: Failpoint, step: int) -> None:
    kind, _, seconds = armed.action.partition("=")
    if kind == "sleep":
        time.sleep(float(seconds))
    elif kind == "raise":
        raise RuntimeError(f"failpoint {armed} at step {step}")
    elif kind in ("enospc", "edquot"):
        code = getattr(errno, kind.upper())
        raise OSError(code, os.strerror(code), armed.point)
    elif kind == "oom":
        taken = [b"x" * _BLOCK_BYTES for _ in range(_MAX_BYTES // _BLOCK_BYTES)]
        raise MemoryError(f"failpoint {armed}: took {len(taken) * _BLOCK_BYTES:,} bytes, and no limit was met")
    else:
        os.kill(os.getpid(), signal.Signals[f"SIG{kind.upper()}"])  # kill, stop or term
