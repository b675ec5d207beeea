"""Starts the processes of a run on this host again and again, until it is done or would end in the same way again.

What follows an exit code is in `restart_policy`. A request to stop goes to the processes, which save; then nothing is
started again. On several hosts each has a supervisor: if one process is lost, all of them leave with 76, are started
again by their supervisors, and meet as at the first start. In an elastic run (`elastic`) the supervisors meet first,
and go on without those that are not there. Imports no JAX, so that it lives where a run does not.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from jaxinfra.errors import CorruptionError, JaxinfraError, PeerLostError, Preempted, RunInUseError, StorageError
from jaxinfra.launchers.launcher import Launcher, ProcessExit, exit_code, find_cause, show_errors
from jaxinfra.launchers.rank_output import Output
from jaxinfra.launchers.restart_policy import CRASHES, RULES, RestartLimits, Rule
from jaxinfra.machine import COMPILE_ANEW
from jaxinfra.processes import step_file

_SHORT_S = 2.0
"""A shorter wait before a start of an elastic run is left out: the hosts wait for one another anyway."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A start of the processes on this host that has ended."""

    attempt: int  # its number, from 1 for the first of this supervisor
    host: str  # name of the host
    supervisor: int  # process id of the supervisor
    pids: Sequence[int]  # process ids of the processes, by rank
    started: str  # when it began, in UTC by the clock of the host, for people and for other hosts
    ended: str  # when the last process had ended, likewise
    started_monotonic_s: float  # the same in seconds since the host was booted, by a clock that nobody sets
    ended_monotonic_s: float  # likewise
    exit_code: int  # of the whole; 76 if a signal killed a process
    signal: str | None  # that killed the process that failed first, or None
    rank: int | None  # of the process that failed first, or None
    reason: str  # why it ended, in words
    error: str | None  # the last error of this process, else of any on this host; None if none has printed one
    log: str  # the file with all that it has printed
    first_step: int | None  # the first step that it completed, counted from 1; None if it completed none
    last_step: int | None  # the last one
    hosts: Mapping[str, Any] | None = None  # the hosts of the start of an elastic run (`rounds.Round`)

    @property
    def rule(self) -> Rule:
        """Whether and when the supervisor starts the run again."""
        return RULES.get(self.exit_code, RULES[JaxinfraError.exit_code])

    def __str__(self) -> str:
        return f"{self.reason} {'before its first step' if self.last_step is None else f'after step {self.last_step}'}"


@dataclass(kw_only=True)
class Watch:
    """Requests of other hosts while the processes of this one run.

    Attributes:
        is_over: whether the start is over.
        can_grow: whether the processes leave after a checkpoint, so that more hosts can join.
        has_stepped: whether the processes have completed a step; set by the supervisor.
    """

    is_over: bool = False
    can_grow: bool = False
    has_stepped: bool = False


@dataclass(frozen=True, kw_only=True)
class Start:
    """A start of the processes on this host.

    Attributes:
        command: the same for all processes.
        environments: for each rank, the variables to add to those of this process.
        first_rank: rank of the first process in the run.
        hosts: the hosts of the start, for the record of an elastic run.
        watch: watches the hosts of an elastic run meanwhile.
    """

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    first_rank: int = 0
    hosts: Mapping[str, Any] | None = None
    watch: AbstractContextManager[Watch] = field(default_factory=lambda: nullcontext(Watch()))

    @property
    def indices(self) -> Sequence[int]:
        """Indices of the hosts of an elastic run."""
        return [] if self.hosts is None else [host["index"] for host in self.hosts["hosts"]]

    @property
    def round_number(self) -> int:
        """Number of the start over the life of an elastic run, from 1; 0 for other runs."""
        return 0 if self.hosts is None else self.hosts["number"]


class Starts(Protocol):
    """Says what each start is."""

    def next_start(self, is_stopped: Callable[[], bool]) -> Start | int:
        """Returns the next start, or the exit code of a run that is not started again on this host."""
        ...

    def end(self, code: int, *, only_here: bool) -> None:
        """Is told that nothing is started again, on all hosts or `only_here`."""
        ...


@dataclass(frozen=True, kw_only=True)
class EqualStarts:
    """Starts of the same processes, each time.

    Attributes:
        command: the same for all processes.
        environments: returns for each rank the variables to add to those of this process; it is called at each start,
            so that a port that was free the last time is looked for again.
        first_rank: rank of the first process in the run.
    """

    command: Sequence[str]
    environments: Callable[[], Sequence[Mapping[str, str]]]
    first_rank: int = 0

    def next_start(self, is_stopped: Callable[[], bool]) -> Start | int:
        """Returns the start."""
        return Start(command=self.command, environments=self.environments(), first_rank=self.first_rank)

    def end(self, code: int, *, only_here: bool) -> None:
        """Does nothing: the other hosts find out when they meet."""


def supervise(
    starts: Starts, logs: Path, logs_location: str, limits: RestartLimits, record: Callable[[Attempt], None]
) -> int:
    """Runs the processes as `launcher.launch`, again after each exit code that allows it, and returns the last code.

    Args:
        starts: says what each start is.
        logs: a folder for `rank-N.log`.
        logs_location: its path or URL, for people.
        limits: how often they are started again.
        record: is told of each attempt.
    """
    launcher, best_step, number = Launcher(), 0, 0
    anew, was_anew = dict[str, str](), False  # at the next start, and at one since the last progress
    doubted: Start | None = None  # one that another host may have ended, before a new step
    aborted: Start | None = None  # of several hosts, one that ended by SIGABRT here, before a new step
    with launcher.handling_signals(), tempfile.TemporaryDirectory(prefix="jaxinfra-steps-") as folder:
        while True:
            number += 1
            start = starts.next_start(lambda: launcher.stop_requested)
            if isinstance(start, int):
                return start
            if doubted is not None and doubted.indices == start.indices:  # no host was the cause
                limits.count(progressed=False)
            if aborted is not None and not {*aborted.indices} <= {*start.indices}:
                # A package such as Gloo aborts a process when another host is lost: it was not its own crash.
                limits.in_a_row, anew = limits.in_a_row - 1, {}
            start = replace(start, environments=[{**each, **anew} for each in start.environments])
            with start.watch as watch, _output(logs, start, is_first=number == 1) as output:
                attempt = _run(logs_location, start, watch, launcher, output, number, Path(folder, "steps"))
                if attempt.exit_code != RunInUseError.exit_code or attempt.last_step is not None:
                    record(attempt)  # else another start has this run, and its directory
                if launcher.interrupted and attempt.signal is not None:
                    raise KeyboardInterrupt
                if launcher.stop_requested or attempt.exit_code == 0:
                    starts.end(attempt.exit_code, only_here=attempt.exit_code != 0)
                    return attempt.exit_code
                progressed = (attempt.last_step or 0) > best_step
                is_others = start.hosts is not None and (watch.is_over or attempt.exit_code == PeerLostError.exit_code)
                is_others = is_others and attempt.signal is None and not progressed
                doubted = start if is_others else None
                aborted = start if start.indices and attempt.signal == "SIGABRT" and not progressed else None
                if not is_others:
                    limits.count(progressed=progressed)
                best_step = max(best_step, attempt.last_step or 0)
                was_anew = not progressed and (was_anew or bool(anew))
                anew = {COMPILE_ANEW: "1"} if attempt.signal in CRASHES and not (progressed or was_anew) else {}
                is_wrong = attempt.exit_code == CorruptionError.exit_code  # whatever the other hosts do
                ends_elsewhere = watch.is_over and not attempt.rule.restarts and not is_wrong
                if (problem := _why_not(attempt, limits)) and not ends_elsewhere:
                    error = f"; last error: {attempt.error}" if attempt.error else ""
                    output.say(f"not started again: {problem}{error}; see {attempt.log}")
                    # Others have trained without this host, which lacks something.
                    is_late = attempt.last_step is None and start.round_number > 1
                    is_own = is_wrong or attempt.exit_code == RunInUseError.exit_code
                    only_here = attempt.rule.restarts or is_late or is_own
                    starts.end(attempt.exit_code, only_here=only_here)
                    return attempt.exit_code
                how = "; all programs are compiled anew: one in the compile cache may be the cause" if anew else ""
                how += ", unless a host is missing" if anew and aborted else ""
                has_grown = start.hosts is not None and attempt.exit_code == Preempted.exit_code
                wait_s = 0.0 if has_grown else limits.restart(attempt.rule, time.monotonic())
                then = f"starting again in {max(1, round(wait_s))} s"
                if start.hosts is not None:
                    then = "meeting the other hosts" + (f" in {round(wait_s)} s" if wait_s > _SHORT_S else "")
                    wait_s = wait_s if wait_s > _SHORT_S else 0.0
                output.say(f"restart {number}: {attempt}; {then}{how}")
                watch.is_over = True  # the others need not wait any longer
                launcher.wait(wait_s)
                if launcher.stop_requested:
                    starts.end(Preempted.exit_code, only_here=True)
                    return Preempted.exit_code


def _output(logs: Path, start: Start, *, is_first: bool) -> Output:
    """Opens the logs; a restart goes on without them, since the run itself may not need their storage just now."""
    num_ranks = len(start.environments)
    try:
        return Output(logs, num_ranks, first_rank=start.first_rank)
    except StorageError as error:
        if is_first:
            raise
        output = Output(None, num_ranks, first_rank=start.first_rank)
        output.say(f"warning: {error}")
        return output


def _why_not(attempt: Attempt, limits: RestartLimits) -> str:
    """Returns why a run is not started again, "" if it is."""
    if not attempt.rule.restarts:
        return f"{attempt}; the same command would end so again"
    if limits.is_crash_loop:
        return f"crash loop: {limits.in_a_row} starts in a row completed no new step, the last one: {attempt}"
    if limits.is_used_up(time.monotonic()):
        return f"{limits.max_per_hour} restarts in an hour, the most that --max-restarts-per-hour allows; {attempt}"
    return ""


def _run(
    logs_location: str,
    start: Start,
    watch: Watch,
    launcher: Launcher,
    output: Output,
    number: int,
    steps_file: Path,
) -> Attempt:
    """Starts the processes and waits for their end."""
    leave_file = step_file.leave_file(steps_file)

    def is_over() -> bool:
        if watch.can_grow:
            leave_file.touch()
        else:
            leave_file.unlink(missing_ok=True)
        if start.hosts is not None and not watch.has_stepped:
            watch.has_stepped = step_file.read_steps(steps_file).first is not None
        return watch.is_over

    step_file.reset_steps(steps_file)
    told = [
        {**each, step_file.VARIABLE: str(steps_file)} if not rank else each
        for rank, each in enumerate(start.environments)
    ]
    started = _utc_now(), time.monotonic()
    ends = launcher.run(start.command, told, output, is_over)
    ended = _utc_now(), time.monotonic()
    code = exit_code(ends, stop_requested=launcher.stop_requested)
    show_errors(ends, output)
    cause = find_cause(ends) or next((end for end in ends if end.code not in (0, Preempted.exit_code)), None)
    rank = 0 if cause is None else cause.rank
    steps = step_file.read_steps(steps_file)
    return Attempt(
        attempt=number,
        host=socket.gethostname(),
        supervisor=os.getpid(),
        pids=[end.pid for end in sorted(ends, key=lambda end: end.rank)],
        started=started[0],
        ended=ended[0],
        started_monotonic_s=round(started[1], 3),
        ended_monotonic_s=round(ended[1], 3),
        exit_code=code,
        signal=None if cause is None else cause.signal,
        rank=None if cause is None else start.first_rank + rank,
        reason=_reason(code, cause, start.first_rank),
        error=output.last_error(rank),
        log=f"{logs_location}/rank-{start.first_rank + rank}.log",
        first_step=steps.first,
        last_step=steps.last,
        hosts=start.hosts,
    )


def _reason(code: int, cause: ProcessExit | None, first_rank: int) -> str:
    if cause is not None and cause.signal is not None:
        return f"process {first_rank + cause.rank} killed by {cause.signal}"
    return f"exit code {code}" + (f" ({RULES[code].meaning})" if code in RULES else "")


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
