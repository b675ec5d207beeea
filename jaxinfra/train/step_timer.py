"""Times steps by when their results are there: a step is dispatched long before it ends."""

import time


class StepTimer:
    """Counts steps and seconds between two readings, without pauses."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._steps = 0
        self._seconds = 0.0

    def finish_step(self) -> None:
        """Counts a step that ends now, unless it is the first one after a pause: that was not timed whole."""
        now_s = time.perf_counter()
        if self._since_s is not None:
            self._seconds += now_s - self._since_s
            self._steps += 1
        self._since_s = now_s

    def pause(self) -> None:
        """Leaves out the time until the next step ends, for what is no step: evaluation, compilation."""
        self._since_s = None

    def read(self) -> float | None:
        """Returns mean seconds a step since the last reading; None if none was timed."""
        if not self._steps:
            return None
        mean_s = self._seconds / self._steps
        self._steps, self._seconds = 0, 0.0
        return mean_s
