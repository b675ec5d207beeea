"""What is due after a step: the one place that decides it."""

from typing import Literal, NamedTuple

from jaxinfra.processes.requests import RunSignals
from jaxinfra.run import Run
from jaxinfra.train.profiler import Profiler


class Due(NamedTuple):
    """What follows a step, in this order.

    Attributes:
        log: its metrics are logged, once the devices have computed it.
        profile: a profile ends.
        evaluation: the parameters are evaluated.
        replicas: the copies of the state on several devices are compared.
        save: what is saved: a checkpoint that somebody has asked for or that is due, or a copy on the hosts.
    """

    log: bool = False
    profile: bool = False
    evaluation: bool = False
    replicas: bool = False
    save: Literal["asked", "checkpoint", "copy"] | None = None

    @property
    def waits(self) -> bool:
        """Whether the step must be reported before: a checkpoint has all metrics up to its step beside it."""
        return self.profile or self.evaluation or self.save is not None


def due_after(step: int, run: Run, profiler: Profiler, requests: RunSignals) -> Due:
    """Returns what is due after a step, counted from 1. All processes must call it after each step."""
    every = run.guard.compare_replicas_every
    return Due(
        log=run.track.due(step, run.train.steps),
        profile=profiler.ends_after(step),
        evaluation=run.train.evaluates_after(step),
        replicas=every is not None and step % every == 0,
        save="asked" if requests.saves_after(step) is not None else run.checkpoint.due_after(step),
    )
