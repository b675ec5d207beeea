"""Accounts for the time of a run, from goodput.jsonl: each second of all its starts has one class. Imports no JAX.

The ledger has a row at each log interval, after each save and evaluation, and at least every ten seconds:
`{"attempt": 2, "t": 31.2, "phase": "step", "step": 40, "from": 20, "resumes": 1, "saves": 3, "seconds": {"init": 3.1,
...}}`. All numbers count from the start of the attempt, which is that of its process; `step` is the last completed
step, `from` the one that it goes on after, and `resumes` counts how often it did: a run may go back without a restart.
The first row of an attempt also has `start`, in seconds since 1970, the only time of a clock that may be changed, and
the number of `processes`. If the energy of the devices is measured, rows have `joules`, and the first one may have
`planned_joules`, those of a step. The row after a request to stop has its reason, `stopped`, such as "SIGTERM" or the
notice of a cloud. A kill loses what came after the last row: that counts as down.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from jaxinfra.storage.json_lines import is_integer, is_number, read_json_lines

GOODPUT_FILE = "goodput.jsonl"
CLASSES = {
    "step": "steps",
    "data": "waiting for data",
    "save": "checkpoint stall",
    "evaluation": "evaluation",
    "replay": "replay",
    "sample": "sampling",
    "profile": "profile",
    "compile": "compile",
    "restore": "restore",
    "init": "init",
    "end": "end",
    "lost": "lost and recomputed",
    "down": "down",
}
"""The classes of time, with their labels."""
_LOOP = ("step", "data")  # is lost if the steps are done again
_LONGEST_S = 1e12  # a longer time is damage


@dataclass(frozen=True, kw_only=True)
class Row:
    """The state of an attempt at one moment."""

    time_s: float  # seconds since its start
    step: int  # last completed step
    from_step: int | None  # the step from which it goes on; None before that is known
    resumes: int  # number of times that it has gone on from a step
    saves: int  # number of checkpoints that it has begun to save
    seconds: Mapping[str, float]  # of each class since its start


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    start_s: float  # when, in seconds since 1970
    rows: Sequence[Row]
    stopped: str | None = None  # why it was asked to stop; None if it was not
    processes: int | None = None  # their number; None in the ledger of an earlier version
    joules: float | None = None  # that all devices have used; None if they were not measured
    planned_joules: float | None = None  # of them for its steps, as planned

    @property
    def from_step(self) -> int | None:
        """The step from which it first went on; None if it did not get there."""
        return next((row.from_step for row in self.rows if row.from_step is not None), None)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A part of the time line, in seconds since the first start, and the seconds of each class in it."""

    begin_s: float
    end_s: float
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Where the time of one run, or of several, went."""

    attempts: int  # number of starts
    seconds: Mapping[str, float]  # of each class
    intervals: Sequence[Interval] = ()  # the time line
    starts_s: Sequence[float] = ()  # of each attempt, in seconds since the first
    processes: Sequence[int | None] = ()  # of each attempt; () if it is the same number in all
    stops: Sequence[tuple[int, str]] = ()  # the last step of each attempt that was asked to stop, and the reason
    stalls_s: Sequence[float] = ()  # how long each save has blocked the training
    save_intervals_s: Sequence[float] = ()  # training time between two saves
    restarts_s: Sequence[float] = ()  # from the end of one, or the start of the only one, to a first step
    joules: float | None = None  # that all devices have used; None if they were not measured
    planned_joules: float | None = None  # what the steps of the attempts should use of it, also of those that are lost

    @property
    def wall_s(self) -> float:
        """Seconds from the first start to the last sign of life."""
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """The goodput: the time of steps that were not lost, as a fraction of the whole."""
        return self.seconds.get("step", 0.0) / self.wall_s if self.wall_s else math.nan


def read_ledger(path: Path) -> list[Attempt]:
    """Reads goodput.jsonl; leaves out damaged lines, and those of an attempt after the next one began."""
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in read_json_lines(path, ledger_row) if path.exists() else ():
        if row["attempt"] >= max(attempts, default=0):
            attempts.setdefault(row["attempt"], []).append(row)
    return [_attempt(rows) for rows in attempts.values() if "start" in rows[0]]


def _attempt(lines: Sequence[Mapping[str, Any]]) -> Attempt:
    from_step = next((line["from"] for line in lines if line["from"] is not None), None)
    rows = [
        Row(
            time_s=line["t"],
            step=line["step"] if line["from"] is not None else from_step or 0,  # before the restore
            from_step=line["from"],
            resumes=line["resumes"],
            saves=line["saves"],
            seconds=_classes(line["seconds"]),
        )
        for line in lines
    ]
    stopped = next((line["stopped"] for line in lines if "stopped" in line), None)
    planned, steps = lines[0].get("planned_joules"), rows[-1].step - (from_step or 0)
    return Attempt(
        start_s=lines[0]["start"],
        rows=rows,
        stopped=stopped,
        processes=lines[0].get("processes"),
        joules=max((line["joules"] for line in lines if "joules" in line), default=None),
        planned_joules=None if planned is None else planned * max(0, steps),
    )


def ledger_row(row: Any) -> dict[str, Any] | None:
    """Returns what is on a line if it is a row of the ledger, else None."""
    if not isinstance(row, dict) or not isinstance(row.get("seconds"), dict):
        return None
    from_step = row.get("from", "")
    counts = [row.get(name) for name in ("attempt", "step", "resumes", "saves")]
    counts += [] if from_step is None else [from_step]
    counts += [row["processes"]] if "processes" in row else []
    times_s = [row.get("t"), row.get("start", 0.0), *row["seconds"].values()]
    joules = [row.get("joules", 0.0), row.get("planned_joules", 0.0)]
    is_right = (
        all(is_integer(each) and each >= 0 for each in counts)
        and all(is_number(each) and 0 <= each < _LONGEST_S for each in times_s)
        and all(is_number(each) and 0 <= each < math.inf for each in joules)
        and isinstance(row.get("stopped", ""), str)
    )
    return row if is_right else None


def _classes(phases: Mapping[str, float]) -> dict[str, float]:
    """Returns the seconds of each class; all phases are classes, but "device" is a part of the steps."""
    seconds = {"step": 0.0, **phases}
    seconds["step"] += seconds.pop("device", 0.0)
    return seconds


def account(attempts: Sequence[Attempt]) -> Goodput:
    """Divides the time of all attempts into classes.

    Steps are lost if they are done again later: all time of the loop after the step from which the run then goes on
    counts as lost. The time between two attempts is down; if a clock was set back between them, it is 0.
    """
    intervals: list[Interval] = []
    starts_s, stalls_s, save_intervals_s, restarts_s = [], [], [], []
    now_s, kept_steps = 0.0, _kept_steps(attempts)  # since the first start
    for number, attempt in enumerate(attempts):
        begin_s = max(now_s, attempt.start_s - attempts[0].start_s)
        if down_s := begin_s - now_s:
            intervals.append(Interval(begin_s=now_s, end_s=begin_s, seconds={"down": down_s}))
        starts_s.append(begin_s)
        first = Row(time_s=0.0, step=attempt.from_step or 0, from_step=None, resumes=0, saves=0, seconds={})
        for before, after in pairwise([first, *attempt.rows]):
            seconds = _lost(before, after, kept_steps[number, after.resumes])
            intervals.append(Interval(begin_s=begin_s + before.time_s, end_s=begin_s + after.time_s, seconds=seconds))
        now_s = begin_s + attempt.rows[-1].time_s
        stalls, saved = _saves(attempt)
        stalls_s += stalls
        save_intervals_s += saved
        at_step = next((row.seconds for row in attempt.rows if row.step > first.step), None)
        if at_step is not None and (number > 0 or len(attempts) == 1):
            restarts_s.append(down_s + sum(at_step.get(name, 0.0) for name in ("init", "restore", "compile")))
    processes = [attempt.processes for attempt in attempts]
    joules, planned_joules = _energy(attempts)
    totals = {name: sum(each.seconds.get(name, 0.0) for each in intervals) for name in CLASSES}
    return Goodput(
        attempts=len(attempts),
        seconds={name: value for name, value in totals.items() if value > 0},
        intervals=intervals,
        starts_s=starts_s,
        processes=processes if len({*processes}) > 1 else (),
        stops=[(attempt.rows[-1].step, attempt.stopped) for attempt in attempts if attempt.stopped is not None],
        stalls_s=stalls_s,
        save_intervals_s=save_intervals_s,
        restarts_s=restarts_s,
        joules=joules,
        planned_joules=planned_joules,
    )


def _kept_steps(attempts: Sequence[Attempt]) -> dict[tuple[int, int], float]:
    """Returns, for each attempt and number of resumes in it, the last step that is not done again later."""
    parts = {(number, row.resumes): row.from_step for number, each in enumerate(attempts) for row in each.rows}
    kept_steps, least = {}, math.inf
    for part, from_step in reversed(parts.items()):
        kept_steps[part] = least
        least = least if from_step is None else min(least, from_step)
    return kept_steps


def _lost(before: Row, after: Row, kept_step: float) -> dict[str, float]:
    """Returns the seconds of each class between two rows; the loop's after `kept_step` are lost."""
    seconds = {name: value - before.seconds.get(name, 0.0) for name, value in after.seconds.items()}
    steps = after.step - before.step
    fraction = min(1.0, (after.step - kept_step) / steps) if steps > 0 else float(after.step >= kept_step)
    if fraction > 0:
        lost_s = fraction * sum(seconds.get(name, 0.0) for name in _LOOP)
        seconds = {name: value * (1 - fraction) if name in _LOOP else value for name, value in seconds.items()}
        seconds["lost"] = lost_s
    return {name: value for name, value in seconds.items() if value > 0}


def _saves(attempt: Attempt) -> tuple[list[float], list[float]]:
    """Returns how long each save has blocked the training, and the time of the loop before each."""
    stalls_s, intervals_s, loop_s = [], [], 0.0
    for before, after in pairwise(attempt.rows):
        if after.saves > before.saves:
            stalls_s.append(after.seconds.get("save", 0.0) - before.seconds.get("save", 0.0))
            now_s = sum(after.seconds.get(name, 0.0) for name in _LOOP)
            intervals_s.append(now_s - loop_s)
            loop_s = now_s
    return stalls_s, intervals_s


def total(runs: Sequence[Goodput]) -> Goodput:
    """Returns the sum over runs, without a time line."""
    names = [name for name in CLASSES if any(name in run.seconds for run in runs)]
    joules, planned_joules = _energy(runs)
    return Goodput(
        attempts=sum(run.attempts for run in runs),
        seconds={name: sum(run.seconds.get(name, 0.0) for run in runs) for name in names},
        stalls_s=[each for run in runs for each in run.stalls_s],
        save_intervals_s=[each for run in runs for each in run.save_intervals_s],
        restarts_s=[each for run in runs for each in run.restarts_s],
        joules=joules,
        planned_joules=planned_joules,
    )


def _energy(parts: Sequence[Attempt | Goodput]) -> tuple[float | None, float | None]:
    """Returns the joules of the parts that were measured, and those that a plan has for all of these."""
    measured = [part for part in parts if part.joules is not None]
    planned = [part.planned_joules for part in measured if part.planned_joules is not None]
    joules = sum(part.joules or 0.0 for part in measured) if measured else None
    return joules, sum(planned) if measured and len(planned) == len(measured) else None


@dataclass(frozen=True, kw_only=True)
class Model:
    """The goodput to expect at a mean time between failures; see `model`."""

    mtbf_s: float
    stall_s: float
    interval_s: float
    restart_s: float
    goodput: float
    best_interval_s: float
    best_goodput: float


def expected_goodput(interval_s: float, stall_s: float, restart_s: float, mtbf_s: float) -> float:
    """Returns the part of the time in which steps are made that are not lost, of a run that fails at random.

    It saves after each `interval_s` seconds of training, which stalls it for `stall_s`; from a failure to the next step
    takes `restart_s`. After J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps"
    (Future Generation Computer Systems 22, 2006): with exponentially distributed failures of mean M, an interval t with
    its save d takes M exp(r/M) (exp((t + d)/M) - 1) on average (eq. 20), so the goodput is t divided by that.
    """
    exponents = restart_s / mtbf_s, (interval_s + stall_s) / mtbf_s
    if not interval_s or sum(exponents) > 500:  # beyond the range of floats
        return 0.0
    return interval_s / (mtbf_s * math.exp(exponents[0]) * math.expm1(exponents[1]))


def best_interval_s(stall_s: float, mtbf_s: float) -> float:
    """Returns the training time between two saves with the highest expected goodput (Daly 2006, eq. 37).

    It is sqrt(2 d M) (1 + sqrt(d/(2M))/3 + (d/(2M))/9) - d, or M if d is 2 M or more; its first term is that of J. W.
    Young (Communications of the ACM 17, 1974).
    """
    ratio = stall_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return math.sqrt(2 * stall_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_s


def model(run: Goodput, mtbf_s: float) -> Model | None:
    """Models the goodput of a run that fails at random with a mean time between failures of `mtbf_s` seconds.

    With the run's own medians of the stall of a save, the training time between two saves, and the restart time.
    Evaluations and waiting for data are left out. Returns None if the run has not saved or not reached a step yet.
    """
    if not (run.stalls_s and run.restarts_s):
        return None
    stall_s, interval_s, restart_s = median(run.stalls_s), median(run.save_intervals_s), median(run.restarts_s)
    best_s = best_interval_s(stall_s, mtbf_s)
    return Model(
        mtbf_s=mtbf_s,
        stall_s=stall_s,
        interval_s=interval_s,
        restart_s=restart_s,
        goodput=expected_goodput(interval_s, stall_s, restart_s, mtbf_s),
        best_interval_s=best_s,
        best_goodput=expected_goodput(best_s, stall_s, restart_s, mtbf_s),
    )
