"""The loop over the steps: dispatch step t, report step t - 1, then do what is due after step t.

The devices never wait for the host: the host waits for a step only after it has dispatched the next one.
"""

import time
from collections.abc import Callable
from typing import Protocol

import jax

from jaxinfra.failpoints import failpoint
from jaxinfra.processes.requests import RunSignals
from jaxinfra.program import Metrics, TrainState
from jaxinfra.train.due import Due, due_after
from jaxinfra.train.job import Job
from jaxinfra.train.profiler import Profiler
from jaxinfra.train.reporting import Reporting

_LATE_S, _BUSY_S = 0.1, 0.001
"""Longest waits for a batch before the loop looks at requests, and while the devices are busy."""


class Batches(Protocol):
    """Batches on the devices, in the order of their steps."""

    def poll(self, timeout_s: float) -> tuple[int, dict[str, jax.Array]] | None:
        """Returns the steps before a batch, and the batch; None if it has not come in time."""
        ...


class Loop:
    """The steps of a training.

    Attributes:
        state: after the last step that was dispatched; on the devices.
        completed_steps: number of steps that it was trained for.
        first_wait_s: seconds of waiting for the first batch, which nothing can read ahead.

    Args:
        job: with the program.
        state: to begin with.
        completed_steps: of that state.
        reporting: of the steps.
        profiler: of some steps.
        requests: to save, or to stop.
        check_owner: raises RunInUseError if another start has taken over the run.
        after_step: does what is due after a step, given its metrics.
        save: saves a checkpoint of the last step, which somebody has asked for while a batch is late.
    """

    def __init__(
        self,
        job: Job,
        state: TrainState,
        completed_steps: int,
        reporting: Reporting,
        profiler: Profiler,
        requests: RunSignals,
        *,
        check_owner: Callable[[], None],
        after_step: Callable[[Due, Metrics], None],
        save: Callable[[], None],
    ) -> None:
        self.state, self.completed_steps, self._first_step = state, completed_steps, completed_steps
        self.first_wait_s = self._late_s = 0.0
        self._job, self._reporting, self._profiler, self._requests = job, reporting, profiler, requests
        self._check_owner, self._after_step, self._save = check_owner, after_step, save
        self._phases = reporting.phases

    def run(self, batches: Batches, last_step: int) -> str | None:
        """Makes all steps up to the last one; returns the reason to stop before it, or None."""
        run, agreement = self._job.run, self._job.peers.agreement
        failpoint("compile", self.completed_steps)
        while self.completed_steps < last_step:
            if (found := self._wait(batches)) is None:
                if self.completed_steps > self._first_step and (reason := self._act_on_requests()) is not None:
                    return reason
                continue
            step, batch = found[0] + 1, found[1]
            if not agreement.begins(step):
                return self._requests.stops_after(self.completed_steps)
            self._profiler.begin_step(step - 1, self.state)
            with self._phases.first("train_step"):
                self.state, metrics = self._job.program.train_step(self.state, batch)
            self._phases.begun = step
            agreement.dispatches(step)
            failpoint("step", step)
            self._reporting.report_pending()  # of the step before, while the devices compute this one
            self._check_owner()
            self.completed_steps = step
            due = due_after(step, run, self._profiler, self._requests)
            self._reporting.dispatched(step, metrics, log=due.log)
            if due.waits:
                self._reporting.report_pending()
            self._after_step(due, metrics)
            if (reason := self._requests.stops_after(step)) is not None:
                return reason
        return None

    def _wait(self, batches: Batches) -> tuple[int, dict[str, jax.Array]] | None:
        """Waits for the next batch for a while; counts the time in which the devices have nothing to do."""
        found = batches.poll(0.0)
        while found is None and self._reporting.devices_are_busy:
            found = batches.poll(_BUSY_S)
        if found is None:
            start_s = time.perf_counter()
            with self._phases("data"):
                found = batches.poll(_LATE_S)
            self._late_s += time.perf_counter() - start_s
        if found is not None:  # a batch that never comes has kept no step waiting
            self._reporting.data_wait_s += self._late_s
            self.first_wait_s += self._late_s if self.completed_steps == self._first_step else 0.0
            self._late_s = 0.0
        return found

    def _act_on_requests(self) -> str | None:
        """Saves if that was asked for while a batch is late; returns the reason to stop, or None."""
        self._reporting.report_pending()
        if self._requests.saves_after(self.completed_steps) is not None:
            self._save()
        return self._requests.stops_after(self.completed_steps)
