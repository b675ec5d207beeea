"""Collects what is logged of the steps since the last log.

Steps are timed by when they finish: JAX dispatches a step long before it runs.
"""

import time
from collections.abc import Mapping
from typing import Any

from jaxinfra.program import Program
from jaxinfra.train.statistics import step_flops, units_per_step


class Interval:
    """The steps since the last log: their losses, their time, and how long they waited for data.

    `history` is what a checkpoint keeps of them, as JSON, so that their mean loss does not depend on restarts.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._since_s: float | None = None  # the end of the last step; None after a pause
        self._num_timed, self._timed_s = 0, 0.0
        self.resume({})
        self._waited_s = 0.0  # `waited_s` at the last log

    def resume(self, record: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint that was saved with this record; that of an older version has no history."""
        self.history: dict[str, Any] = {"loss_sum": 0.0, "losses": 0, "skipped": 0, **record.get("interval", {})}

    def finish_step(self) -> None:
        """Times a step that ends now, unless it is the first one after a pause, whose start is unknown."""
        now_s = time.perf_counter()
        if self._since_s is not None:
            self._timed_s += now_s - self._since_s
            self._num_timed += 1
        self._since_s = now_s

    def add(self, loss: float, *, skipped: bool) -> None:
        """Adds the loss of the step that was finished last; that of a skipped step may not be finite."""
        old = self.history  # stays as it is: a thread may still be writing it
        if skipped:
            self.history = {**old, "skipped": old["skipped"] + 1}
        else:  # one by one, so that the sum has the same bits after a restart
            self.history = {**old, "loss_sum": old["loss_sum"] + loss, "losses": old["losses"] + 1}

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of the steps so far; None if there is none, or all were skipped."""
        return self.history["loss_sum"] / self.history["losses"] if self.history["losses"] else None

    def pause(self) -> None:
        """Leaves out the time until the next step ends, for evaluation and compilation."""
        self._since_s = None

    def read(self, *, waited_s: float, peak_flops: float) -> dict[str, float]:
        """Returns the metrics of the interval, and begins the next one.

        `waited_s` are the seconds for which this start has waited for data so far, `peak_flops` FLOP/s of one device.
        """
        values = {"data_wait_s": waited_s - self._waited_s}
        self._waited_s = waited_s
        if (mean := self.mean_loss) is not None:
            values["loss_mean"] = mean
        if self.history["skipped"]:
            values["skipped_steps"] = self.history["skipped"]
        self.resume({})
        if self._num_timed:
            values["step_time_s"] = step_time_s = self._timed_s / self._num_timed
            self._num_timed, self._timed_s = 0, 0.0
            values[f"{self._program.run.data.modality}s_per_s"] = units_per_step(self._program) / step_time_s
            values["mfu"] = step_flops(self._program) / step_time_s / (peak_flops * self._program.mesh.size)
        return values
