"""Starts the processes of a run on this host again and again, until it is done or would end in the same way again.

What follows an exit code is in `restart_policy`. A request to stop goes to the processes, which save; then nothing is
started again. On several hosts each has a supervisor: if one process is lost, all of them leave with 76, are started
again by their supervisors, and meet as at the first start. Imports no JAX, so that it lives where a run does not.
"""

import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jaxinfra.errors import JaxinfraError, Preempted, RunInUseError, StorageError
from jaxinfra.launchers.launcher import Launcher, ProcessExit, exit_code, find_cause, show_errors
from jaxinfra.launchers.rank_output import Output
from jaxinfra.launchers.restart_policy import CRASHES, RULES, RestartLimits, Rule
from jaxinfra.machine import COMPILE_ANEW
from jaxinfra.processes import step_file


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
    error: str | None  # the last error that this process has printed, or None
    log: str  # the file with all that it has printed
    first_step: int | None  # the first step that it completed, counted from 1; None if it completed none
    last_step: int | None  # the last one

    @property
    def rule(self) -> Rule:
        """Whether and when the supervisor starts the run again."""
        return RULES.get(self.exit_code, RULES[JaxinfraError.exit_code])

    @property
    def is_refused(self) -> bool:
        """Whether another start has this run, and its directory."""
        return self.exit_code == RunInUseError.exit_code and self.last_step is None

    def __str__(self) -> str:
        return f"{self.reason} {'before its first step' if self.last_step is None else f'after step {self.last_step}'}"


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Names the processes to start."""

    command: Sequence[str]  # the same for all processes
    # Returns for each rank the variables to add to those of this process; it is called at each start, so that a
    # port that was free the last time is looked for again.
    environments: Callable[[], Sequence[Mapping[str, str]]]
    logs: Path  # a folder for `rank-N.log`
    logs_location: str  # its path or URL, for people
    first_rank: int = 0  # rank of the first process in the run


def supervise(what: Supervised, limits: RestartLimits, record: Callable[[Attempt], None]) -> int:
    """Runs the processes as `launcher.launch`, again after each exit code that allows it, and returns the last code.

    `record` is told of each attempt.
    """
    launcher, best_step, number = Launcher(), 0, 0
    anew, was_anew = dict[str, str](), False  # at the next start, and at one since the last progress
    with launcher.handling_signals(), tempfile.TemporaryDirectory(prefix="jaxinfra-steps-") as folder:
        while True:
            number += 1
            environments = [{**each, **anew} for each in what.environments()]
            with _output(what, len(environments), is_first=number == 1) as output:
                attempt = _run(what, environments, launcher, output, number, Path(folder, "steps"))
            if not attempt.is_refused:
                record(attempt)
            if launcher.interrupted and attempt.signal is not None:
                raise KeyboardInterrupt
            if launcher.stop_requested or attempt.exit_code == 0:
                return attempt.exit_code
            progressed = (attempt.last_step or 0) > best_step
            limits.count(progressed=progressed)
            best_step = max(best_step, attempt.last_step or 0)
            was_anew = not progressed and (was_anew or bool(anew))
            anew = {COMPILE_ANEW: "1"} if attempt.signal in CRASHES and not (progressed or was_anew) else {}
            if problem := _why_not(attempt, limits):
                error = f"; last error: {attempt.error}" if attempt.error else ""
                output.say(f"not started again: {problem}{error}; see {attempt.log}")
                return attempt.exit_code
            wait_s = limits.restart(attempt.rule, time.monotonic())
            how = "; all programs are compiled anew: one in the compile cache may be the cause" if anew else ""
            output.say(f"restart {number}: {attempt}; starting again in {max(1, round(wait_s))} s{how}")
            launcher.wait(wait_s)
            if launcher.stop_requested:
                return Preempted.exit_code


def _output(what: Supervised, num_ranks: int, *, is_first: bool) -> Output:
    """Opens the logs; a restart goes on without them, since the run itself may not need their storage just now."""
    try:
        return Output(what.logs, num_ranks, first_rank=what.first_rank)
    except StorageError as error:
        if is_first:
            raise
        output = Output(None, num_ranks, first_rank=what.first_rank)
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
    what: Supervised,
    environments: Sequence[Mapping[str, str]],
    launcher: Launcher,
    output: Output,
    number: int,
    steps_file: Path,
) -> Attempt:
    """Starts the processes and waits for their end."""
    step_file.reset_steps(steps_file)
    told = [
        {**each, step_file.VARIABLE: str(steps_file)} if not rank else each for rank, each in enumerate(environments)
    ]
    started = _utc_now(), time.monotonic()
    ends = launcher.run(what.command, told, output)
    ended = _utc_now(), time.monotonic()
    code = exit_code(ends, stop_requested=launcher.stop_requested)
    show_errors(ends, output)
    cause = find_cause(ends) or next((end for end in ends if end.code), None)
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
        rank=None if cause is None else what.first_rank + rank,
        reason=_reason(code, cause, what.first_rank),
        error=output.last_error(rank),
        log=f"{what.logs_location}/rank-{what.first_rank + rank}.log",
        first_step=steps.first,
        last_step=steps.last,
    )


def _reason(code: int, cause: ProcessExit | None, first_rank: int) -> str:
    if cause is not None and cause.signal is not None:
        return f"process {first_rank + cause.rank} killed by {cause.signal}"
    return f"exit code {code}" + (f" ({RULES[code].meaning})" if code in RULES else "")


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
