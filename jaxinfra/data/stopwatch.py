"""Measures how long threads spend in a stage, and warns if a run waits for its data."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_FIXES = {  # what to suggest for each slow stage of the input pipeline
    "reading": "use a store nearer to this machine, or more data.threads",
    "decoding": "use more data.threads, if there are cores for them",
    "transfer": "use a smaller train.global_batch a process, or faster links to the devices",
}

MAX_WAIT_FRACTION = 0.05  # a run that waits for data for a larger fraction of its time gets a warning


class Stopwatch:
    """Sums the seconds that all threads spend inside `running`, which may be more than the time that passed."""

    def __init__(self) -> None:
        self.total_s = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time until the `with` block ends."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - start_s
            with self._lock:
                self.total_s += elapsed_s


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
