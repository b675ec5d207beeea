"""What is due after a step: the one place that decides it."""

from typing import Literal, NamedTuple

from jaxinfra.processes.requests import RunSignals
from jaxinfra.run import Run
from jaxinfra.train.cadence import Cadence
from jaxinfra.train.profiler import Profiler

type Save = Literal["asked", "checkpoint", "copy"]
"""Kinds of saves: a checkpoint on request, a checkpoint that is due, or a copy of the state on the hosts."""


class Due(NamedTuple):
    """Says what to do after a step, in this order."""

    log: bool = False  # whether its metrics are logged, once the devices have computed it
    profile: bool = False  # whether a profile ends
    evaluation: bool = False  # whether the parameters are evaluated
    replicas: bool = False  # whether the copies of the state on several devices are compared
    save: Save | None = None  # what is saved, if anything

    @property
    def waits(self) -> bool:
        """Whether the loop waits for the step and reports it first, so that a checkpoint has all metrics beside it."""
        return self.profile or self.evaluation or self.save is not None


def replays(step: int, run: Run, cadence: Cadence) -> bool:
    """Whether a step, counted from 1, is computed again on other devices: also each one that a checkpoint follows."""
    if (every := run.guard.replay_every) is None:
        return False
    return step % every == 0 or step == run.train.steps or cadence.due_after(step) == "checkpoint"


def due_after(step: int, run: Run, cadence: Cadence, profiler: Profiler, requests: RunSignals) -> Due:
    """Returns what is due after a step, counted from 1.

    All processes must call it after each step, since `requests` may wait for them to agree.
    """
    every = run.guard.compare_replicas_every
    return Due(
        log=run.track.due(step, run.train.steps),
        profile=profiler.ends_after(step),
        evaluation=run.train.evaluates_after(step),
        replicas=every is not None and step % every == 0,
        save="asked" if requests.saves_after(step) is not None else cadence.due_after(step),
    )
