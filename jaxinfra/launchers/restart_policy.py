"""Decides by exit code whether a run starts again: the one table that supervisor, `--help` and pages agree with.

The limits are those that run programs elsewhere: Kubernetes doubles the wait up to five minutes, as
`CrashLoopBackOff`; systemd gives up after five starts in a row (`StartLimitBurst`).
"""

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxinfra import errors

DEFAULT_MAX_PER_HOUR = 12
"""Restarts in any hour: as many as Kubernetes makes of a container that always fails."""
CRASHES = frozenset({"SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSEGV", "SIGSYS", "SIGTRAP"})
"""Signals that a process brings about itself, as a program from another CPU may do; others come from outside."""
_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Gives the meaning of an exit code, and says whether the supervisor starts the run again."""

    meaning: str  # in a few words, for `--help` and for lines of the supervisor
    restarts: bool = False  # whether the same command is started again
    wait_s: float = 1.0  # seconds before the first of several restarts without progress; each doubles the wait


INTERRUPTED = 130
"""The exit code of a program that Ctrl-C ends, as shells report SIGINT."""

RULES: Mapping[int, Rule] = {
    0: Rule(meaning="done"),
    1: Rule(meaning="a bug"),
    2: Rule(meaning="wrong usage"),
    errors.Preempted.exit_code: Rule(meaning="stopped and saved", restarts=True),
    errors.PeerLostError.exit_code: Rule(meaning="another process lost", restarts=True),
    errors.HungError.exit_code: Rule(meaning="no progress in time", restarts=True),
    errors.DataError.exit_code: Rule(meaning="data damaged"),
    errors.CheckpointError.exit_code: Rule(meaning="no usable checkpoint"),
    errors.NonFiniteError.exit_code: Rule(meaning="loss or gradient NaN or infinite"),
    errors.ConfigError.exit_code: Rule(meaning="invalid config or mesh"),
    errors.StorageError.exit_code: Rule(meaning="no storage", restarts=True, wait_s=60.0),
    errors.CorruptionError.exit_code: Rule(meaning="devices compute differently"),
    errors.RunInUseError.exit_code: Rule(meaning="another start trains this run"),
    INTERRUPTED: Rule(meaning="interrupted"),
    134: Rule(meaning="aborted by a package (SIGABRT)", restarts=True),
}
"""By exit code. A process that a signal has killed, such as for memory, counts as one that is lost (76)."""


@dataclass(kw_only=True)
class RestartLimits:
    """How often, and after which wait, a run is started again."""

    max_per_hour: int = DEFAULT_MAX_PER_HOUR  # restarts in any hour
    max_in_a_row: int = 5  # starts in a row without progress, after which it is a crash loop
    # Bound of the wait, which doubles from `Rule.wait_s` on; the rule's own wait may be longer.
    longest_wait_s: float = 300.0
    scale: float = 1.0  # factor of all waits; for tests
    in_a_row: int = 0  # number of starts without progress since the last one with some
    _restarts_s: deque[float] = field(default_factory=deque)

    def count(self, *, progressed: bool) -> None:
        """Counts a start that has ended."""
        self.in_a_row = 0 if progressed else self.in_a_row + 1

    @property
    def is_crash_loop(self) -> bool:
        """Whether the last starts have all ended without progress."""
        return self.in_a_row >= self.max_in_a_row

    def is_used_up(self, now_s: float) -> bool:
        """Whether the last hour has had as many restarts as it may."""
        while self._restarts_s and now_s - self._restarts_s[0] >= _HOUR_S:
            self._restarts_s.popleft()
        return len(self._restarts_s) >= self.max_per_hour

    def restart(self, rule: Rule, now_s: float) -> float:
        """Counts a restart and returns the seconds to wait before it: up to a half more or less than its share.

        So the hosts of a run do not all ask the storage, or each other, at the same moment.
        """
        self._restarts_s.append(now_s)
        doubled_s = rule.wait_s * 2 ** max(0, self.in_a_row - 1)
        return self.scale * min(doubled_s, max(rule.wait_s, self.longest_wait_s)) * random.uniform(0.5, 1.5)
