"""Time that many threads spend on one thing, and what is said of it when a run has waited for its data."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

MAX_WAIT_FRACTION = 0.05  # share of its time that a run may wait for data before it is said


class Stopwatch:
    """Sums the seconds that threads spend inside of it; several at once count severally."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the time until it is left."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            took_s = time.perf_counter() - start_s
            with self._lock:
                self.total_s += took_s


def input_bound_warning(
    waited_s: float, wall_s: float, stages_s: Mapping[str, float], remedies: Mapping[str, str]
) -> str | None:
    """Returns a warning for a run that waited `waited_s` of its `wall_s` for batches; None where it hardly waited.

    `stages_s` are what each stage of making batches took, divided by the threads that work on it at once; `remedies`
    say what helps where it is slow.
    """
    if waited_s <= MAX_WAIT_FRACTION * wall_s:
        return None
    slowest = max(stages_s, key=stages_s.__getitem__)
    shown = ", ".join(f"{stage} {took_s:.1f} s" for stage, took_s in stages_s.items())
    return (
        f"data was late: waited {waited_s:.1f} s of {wall_s:.1f} s ({waited_s / wall_s:.0%}) for batches; {slowest} is "
        f"the slow stage ({shown}); {remedies[slowest]}"
    )
