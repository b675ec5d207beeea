"""Records the phase of a run at each moment: every second of a start belongs to exactly one.

The `Trainer` declares its phases, `with phases("restore"):`. What else the process does is "init" before the first one
and "step" in the training loop. The goodput ledger sums the phases, and the watchdog has a deadline for each.

A phase costs the loop less than a microsecond, and no lock: only one thread enters phases. What other threads read is
exact all the same: the time of the current phase is the time since the start less that of all other phases.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Self

PHASES: tuple[str, ...] = (
    *("init", "compile", "restore", "step", "device", "data", "save", "evaluation", "replay", "sample", "profile"),
    "end",
)
"""The phases; "device" is the part of "step" in which the loop waits for the devices."""
LOOP_PHASES = frozenset({"step", "device", "data"})
"""The phases that alternate in each step."""
_TIMED_STEPS = 100  # the last ones, of which `median_step_s` is the median
_STAT, _UPTIME = Path("/proc/self/stat"), Path("/proc/uptime")


class Phases:
    """The current phase of the main thread, the seconds of each, and the steps.

    Attributes:
        start_s: when this start began, by `time.monotonic`.
        start_step: number of completed steps from which the training goes on; None before that is known.
        resumes: number of calls of `resume`: one at the start, and one each time the run goes back.
        begun: number of the last step that was dispatched.
        done: number of the last step that has ended.
        on_leave: is called with the name of a phase that has ended, if it is not one of `LOOP_PHASES`.
    """

    def __init__(self) -> None:
        self.on_leave: Callable[[str], None] = lambda phase: None
        self.restart(time.monotonic())

    def restart(self, start_s: float) -> None:
        """Begins with "init" at a time of `time.monotonic`."""
        self.start_s, self.begun, self.done = start_s, 0, 0
        self.start_step: int | None = None
        self.resumes = 0
        self._name, self._since_s = "init", start_s
        self._totals_s = dict.fromkeys(PHASES, 0.0)
        self._outer: list[str] = []  # the phases around the current one
        self._next = "init"  # the phase that the next `with` enters
        self._compiled = set[str]()
        self._progress_s = start_s  # the end of the last step
        self._step_end_s: float | None = None  # of the step before, if nothing but steps came after it
        self._steps_s: deque[float] = deque(maxlen=_TIMED_STEPS)

    def __call__(self, name: str) -> Self:
        """Names the phase of the `with` block that follows."""
        self._next = name
        return self

    def first(self, function: str) -> Self:
        """Names "compile" at the first use of a compiled function, and the current phase after that."""
        self._next = self._name if function in self._compiled else "compile"
        self._compiled.add(function)
        return self

    def __enter__(self) -> None:
        self._outer.append(self._name)
        self._switch(self._next)

    def __exit__(self, *exception: object) -> None:
        left = self._name
        self._switch(self._outer.pop())
        if left not in LOOP_PHASES and left != self._name:
            self._step_end_s = None
            self.on_leave(left)

    def enter(self, name: str) -> None:
        """Begins a phase that lasts until the next one."""
        left = self._name
        self._switch(name)
        self.on_leave(left)

    def resume(self, step: int) -> None:
        """Records the number of steps from which the training goes on, at the start or after it has gone back."""
        self.start_step = self.begun = self.done = step
        self.resumes += 1

    def _switch(self, name: str) -> None:
        now_s = time.monotonic()
        self._totals_s[self._name] += now_s - self._since_s
        self._name, self._since_s = name, now_s

    def finish_step(self, step: int) -> None:
        """Records the end of a step, counted from 1."""
        now_s = time.monotonic()
        if self._step_end_s is not None:
            self._steps_s.append(now_s - self._step_end_s)
        self._step_end_s = self._progress_s = now_s
        self.done = step

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase until now; their sum is the time since the start."""
        totals_s, name = dict(self._totals_s), self._name
        elapsed_s = time.monotonic() - self.start_s
        totals_s[name] = 0.0
        totals_s[name] = max(0.0, elapsed_s - sum(totals_s.values()))
        return totals_s

    @property
    def current(self) -> str:
        """The current phase."""
        return self._name

    def idle_s(self) -> float:
        """Returns the seconds since the current phase began or the last step ended."""
        return time.monotonic() - max(self._since_s, self._progress_s)

    def median_step_s(self) -> float | None:
        """Returns the median time of the last steps; None before the second step has ended."""
        return median(list(self._steps_s)) if self._steps_s else None


_process_has_trained = False


def attempt_start_s() -> float:
    """Returns the time at which the start of a training counts as begun, by `time.monotonic`.

    The first start in a process began with the process, so that imports count. A later one, and one in a notebook or
    at a prompt, begins now.
    """
    global _process_has_trained
    now_s = time.monotonic()
    is_first, _process_has_trained = not _process_has_trained, True
    return now_s - _process_age_s() if is_first and not hasattr(sys, "ps1") else now_s


def _process_age_s() -> float:
    """Returns the seconds since this process was started; 0 without /proc (macOS)."""
    try:
        fields, uptime_s = _STAT.read_text().rpartition(")")[2].split(), float(_UPTIME.read_text().split()[0])
    except FileNotFoundError:
        return 0.0
    return max(0.0, uptime_s - int(fields[19]) / os.sysconf("SC_CLK_TCK"))  # field 22, starttime: proc_pid_stat(5)
