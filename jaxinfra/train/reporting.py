"""Waits for the steps that the loop has dispatched, and logs those that are due: one step late."""

from collections.abc import Callable

import jax

from jaxinfra.processes.devices import device_memory
from jaxinfra.program import Metrics
from jaxinfra.track.base import Tracker
from jaxinfra.track.memory import process_metrics
from jaxinfra.train.interval import Interval
from jaxinfra.train.job import Job
from jaxinfra.train.numerics import Numerics
from jaxinfra.train.watch import Watch, is_busy


class Reporting:
    """The steps of a training after their dispatch.

    Attributes:
        phases: the phases of the training.
        stragglers: finds the processes that hold up the others.
        interval: the steps since the last log.
        data_wait_s: seconds for which the loop has waited for batches while the devices had nothing to do.

    `peak_flops` are FLOP/s of one device. `skipped` returns the number of samples that were left out up to a step, as a
    metric; {} if the run leaves out none.
    """

    def __init__(
        self,
        job: Job,
        watch: Watch,
        numerics: Numerics,
        trackers: Tracker,
        *,
        peak_flops: float,
        skipped: Callable[[int], dict[str, float]],
    ) -> None:
        self._job, self._watch, self._numerics, self._trackers = job, watch, numerics, trackers
        self._peak_flops, self._skipped = peak_flops, skipped
        self.phases, self.stragglers = watch.phases, watch.stragglers
        self.interval, self.data_wait_s = Interval(job.program), 0.0
        self._pending: tuple[int, Metrics, bool] | None = None  # step, metrics, whether they are logged

    @property
    def devices_are_busy(self) -> bool:
        """Whether the devices still compute the last step that was dispatched."""
        return self._pending is not None and is_busy(self._pending[1]["loss"])

    def dispatched(self, step: int, metrics: Metrics, *, log: bool) -> None:
        """Keeps the metrics of a step, counted from 1, which the devices compute now, for `report_pending`."""
        self._pending = step, metrics, log

    def report_pending(self) -> None:
        """Waits for the step that was dispatched last, if it is not reported yet, and logs its metrics if they are due.

        Raises NonFiniteError if the loss or the gradient is not finite, or Rewind if the guard says so.
        """
        if self._pending is None:
            return
        (step, metrics, log), self._pending = self._pending, None
        was_ready = not is_busy(metrics["loss"])
        with self.phases("device"):
            jax.block_until_ready(metrics)
        self.phases.finish_step(step)
        self.stragglers.finish_step(step, was_ready=was_ready)
        self.interval.finish_step()
        self._trackers.finish_step(step)
        self._job.step_writer.complete(step)
        loss, skipped = self._numerics.look(step, metrics)
        self.interval.add(loss, skipped=skipped)
        if log:
            self._log(step, metrics)

    def finish(self) -> None:
        """Reports the last step, whose numbers must be finite; raises NonFiniteError."""
        if self._pending is not None:
            step, metrics, _ = self._pending
            self.report_pending()
            self._numerics.require_finite(step, metrics)

    def _log(self, step: int, metrics: Metrics) -> None:
        values = self._numerics.require_finite(step, metrics)
        values.pop("skipped", None)  # the interval counts them
        self._watch.energy.tell()
        values |= self.interval.read(waited_s=self.data_wait_s, peak_flops=self._peak_flops)
        self._watch.ledger.write()
        values |= process_metrics() | device_memory() | self.stragglers.metrics | self._skipped(step)
        self._trackers.log(step, values)
