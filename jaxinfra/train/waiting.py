"""Waits for the batch of the next step, and counts the seconds in which the devices have nothing to do meanwhile."""

import time
from collections.abc import Callable, Mapping

import jax

from jaxinfra.train.reporting import Reporting

type NextBatch = tuple[int, dict[str, jax.Array]]
"""The number of steps before a batch, and the batch on the devices."""
type Poll = Callable[[float], NextBatch | None]
"""Waits for the next batch for a number of seconds; returns None if it has not come in time."""

LATE_S = 0.1
"""How long the loop waits for a batch that is late before it looks at requests again."""
_BUSY_S = 0.001  # how long it waits before it looks whether the devices are still busy
MAX_WAIT_FRACTION = 0.05  # a run that waits for data for a larger fraction of its time gets a warning
_FIXES = {  # what to suggest for each slow stage of the input pipeline
    "reading": "use a store nearer to this machine, or more data.threads",
    "decoding": "use more data.threads, if there are cores for them",
    "transfer": "use a smaller train.global_batch a process, or faster links to the devices",
}


class Waiting:
    """Waits for batches, and counts the seconds of late ones, in `Reporting.data_wait_s`.

    Attributes:
        first_s: seconds of waiting for the first batch, which nothing can read ahead.
    """

    def __init__(self, reporting: Reporting) -> None:
        self._reporting, self._is_first = reporting, True
        self.first_s = 0.0

    def next(self, poll: Poll, act: Callable[[], str | None]) -> NextBatch | str:
        """Returns the next batch; or the reason to stop before it, if `act`, which is called while it is late, has one.

        One that comes while the devices are busy keeps nothing waiting, and one that never comes has kept no step
        waiting. Late ones keep the phase "data": the watchdog ends a run whose batch never comes.
        """
        reporting, found = self._reporting, poll(0.0)
        if found is None and reporting.devices_are_busy:
            with reporting.phases("device"):
                while found is None and reporting.devices_are_busy:
                    found = poll(_BUSY_S)
        if found is None:
            start_s = time.perf_counter()
            with reporting.phases("data"):
                while (found := poll(LATE_S)) is None:
                    if (reason := act()) is not None:
                        return reason
                late_s = time.perf_counter() - start_s
            reporting.data_wait_s += late_s
            self.first_s = late_s if self._is_first else self.first_s
        self._is_first = False
        return found


def input_bound_warning(wait_s: float, wall_s: float, stage_times_s: Mapping[str, float]) -> str | None:
    """Returns a warning if a run of `wall_s` seconds waited for batches, else None.

    It names the slowest stage and its fix. `stage_times_s` are divided by the number of threads of the stage.
    """
    if wait_s <= MAX_WAIT_FRACTION * wall_s:
        return None
    slowest = max(stage_times_s, key=stage_times_s.__getitem__)
    times = ", ".join(f"{stage} {time_s:.1f} s" for stage, time_s in stage_times_s.items())
    return (
        f"input-bound: waited {wait_s:.1f} s of {wall_s:.1f} s ({wait_s / wall_s:.0%}) for batches; {slowest} is "
        f"the slowest stage ({times}); {_FIXES[slowest]}"
    )
