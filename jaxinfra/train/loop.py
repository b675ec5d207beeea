"""The loop over the steps: dispatch step t, report step t - 1, then do what is due after step t.

The devices never wait for the host: the host waits for a step only after it has dispatched the next one.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field

from jaxinfra.failpoints import failpoint
from jaxinfra.parallel.spec import Batch
from jaxinfra.processes.requests import RunSignals
from jaxinfra.program import Metrics, TrainState
from jaxinfra.train.cadence import Cadence
from jaxinfra.train.due import Due, due_after, replays
from jaxinfra.train.job import Job
from jaxinfra.train.profiler import Profiler
from jaxinfra.train.reporting import Reporting
from jaxinfra.train.waiting import Poll, Waiting


@dataclass(eq=False)
class Loop:
    """The steps of a training.

    Attributes:
        job: has the program.
        state: the train state on the devices, after the last step that was dispatched.
        completed_steps: number of steps that the state was trained for.
        reporting: waits for the dispatched steps, and logs them.
        profiler: profiles some of the steps.
        waiting: waits for the batches, and counts the seconds.
        cadence: says when checkpoints are due.
        requests: says when to save or to stop, because a signal or another process has asked for it.
        check_owner: raises RunInUseError if another start has taken over the run.
        after_step: does what is due after a step, given its metrics.
        save: saves a checkpoint of the last step, which somebody has asked for while a batch is late.
        replay: makes a step, and computes it again on other devices; None without replays.
        leaves: returns the reason to stop after a checkpoint, or None; all processes call it, and find the same.
    """

    job: Job
    state: TrainState
    completed_steps: int
    reporting: Reporting
    profiler: Profiler
    waiting: Waiting
    cadence: Cadence
    requests: RunSignals
    _: KW_ONLY
    check_owner: Callable[[], None]
    after_step: Callable[[Due, Metrics], None]
    save: Callable[[], object]
    replay: Callable[[int, TrainState, Batch], tuple[TrainState, Metrics]] | None = None
    leaves: Callable[[], str | None] = lambda: None
    _has_stepped: bool = field(default=False, init=False)

    def run(self, poll: Poll, last_step: int) -> str | None:
        """Makes all steps, with the batches of `poll`; returns the reason to stop before the last one, or None."""
        failpoint("compile", self.completed_steps)
        while self.completed_steps < last_step:
            found = self.waiting.next(poll, self._act_on_requests)
            if isinstance(found, str):
                return found
            step, batch = found[0] + 1, found[1]  # steps are counted from 1
            if not self.job.peers.agreement.begins(step):  # all processes stop before it
                return self.requests.stops_after(self.completed_steps)
            self.profiler.begin_step(step - 1, self.state)
            self.state, metrics = self._step(step, batch)
            self.reporting.phases.begun = step
            self.job.peers.agreement.dispatches(step)
            failpoint("step", step)
            self.reporting.report_pending()  # of the step before, while the devices compute this one
            self.check_owner()
            self.completed_steps, self._has_stepped = step, True
            due = due_after(step, self.job.run, self.cadence, self.profiler, self.requests)
            self.reporting.dispatched(step, metrics, log=due.log)
            probes = step < last_step and self.reporting.stragglers.probes_after(step)
            if due.waits or probes:
                self.reporting.report_pending()
            if probes:
                self.reporting.stragglers.probe_devices(step, skip=self.profiler.is_running)
            self.after_step(due, metrics)
            if (reason := self.requests.stops_after(step)) is not None:
                return reason
            if due.save == "checkpoint" and step < last_step and (reason := self.leaves()) is not None:
                return reason
        return None

    def _step(self, step: int, batch: Batch) -> tuple[TrainState, Metrics]:
        """Dispatches a step; one that is computed twice has ended when this returns."""
        if self.replay is not None and replays(step, self.job.run, self.cadence):
            self.reporting.report_pending()
            self.reporting.interval.pause()
            return self.replay(step, self.state, batch)
        with self.reporting.phases.first("train_step"):
            return self.job.program.train_step(self.state, batch)

    def _act_on_requests(self) -> str | None:
        """Saves if that was asked for; returns the reason to stop, or None. Before the first step it does neither."""
        if not self._has_stepped:
            return None
        self.reporting.report_pending()
        if self.requests.saves_after(self.completed_steps) is not None:
            with self.reporting.phases("save"):
                self.save()
        return self.requests.stops_after(self.completed_steps)
