"""Times steps by when they finish: JAX dispatches a step long before it runs."""

import time


class StepTimer:
    """Measures the mean step time between two readings, without pauses."""

    def __init__(self) -> None:
        self._since_s: float | None = None
        self._steps = 0
        self._seconds = 0.0

    def finish_step(self) -> None:
        """Counts a step that ends now, unless it is the first one after a pause, whose start is unknown."""
        now_s = time.perf_counter()
        if self._since_s is not None:
            self._seconds += now_s - self._since_s
            self._steps += 1
        self._since_s = now_s

    def pause(self) -> None:
        """Leaves out the time until the next step ends, for evaluation and compilation."""
        self._since_s = None

    def read(self) -> float | None:
        """Returns the mean seconds per step since the last reading; None if no step was timed."""
        if not self._steps:
            return None
        mean_s = self._seconds / self._steps
        self._steps, self._seconds = 0, 0.0
        return mean_s
