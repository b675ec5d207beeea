"""The time that finished steps take.

A step is dispatched long before it is finished; only the end of its work on the devices says how long it took.
The clock is read when the results of a step are there.
"""

import time


class StepClock:
    """Steps and seconds between two readings, without the pauses that were no step."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._steps = 0
        self._seconds = 0.0

    def finished(self) -> None:
        """The next step is finished now. The first one after a pause is not counted: it was not timed whole."""
        now_s = time.perf_counter()
        if self._since_s is not None:
            self._seconds += now_s - self._since_s
            self._steps += 1
        self._since_s = now_s

    def pause(self) -> None:
        """What happens until the next step is finished is no step: evaluation, compilation."""
        self._since_s = None

    def read(self) -> float | None:
        """Mean seconds a step since the last reading; None if none was timed."""
        if not self._steps:
            return None
        mean_s = self._seconds / self._steps
        self._steps, self._seconds = 0, 0.0
        return mean_s
