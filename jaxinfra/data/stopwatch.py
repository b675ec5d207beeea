"""Measures how long threads spend in a stage of the input pipeline."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


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
