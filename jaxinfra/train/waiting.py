"""Waits for the batch of the next step, and counts the seconds in which the devices have nothing to do meanwhile."""

import time
from collections.abc import Callable

import jax

from jaxinfra.train.reporting import Reporting

type NextBatch = tuple[int, dict[str, jax.Array]] | None
"""The number of steps before a batch, and the batch on the devices; None if it has not come in time."""

_LATE_S, _BUSY_S = 0.1, 0.001
"""Longest waits for a batch before the loop looks at requests, and while the devices are busy."""


class Waiting:
    """Waits for batches, and adds the idle seconds to `Reporting.data_wait_s` once the batch has come.

    Attributes:
        first_s: seconds of waiting for the first batch, which nothing can read ahead.
    """

    def __init__(self, reporting: Reporting) -> None:
        self._reporting, self._late_s = reporting, 0.0  # so far, for the batch that comes next
        self.first_s = 0.0

    def next_batch(self, poll: Callable[[float], NextBatch], *, is_first: bool) -> NextBatch:
        """Waits for a batch for a short time; `poll` waits for it for a number of seconds."""
        found = poll(0.0)
        while found is None and self._reporting.devices_are_busy:
            found = poll(_BUSY_S)
        if found is None:
            start_s = time.perf_counter()
            with self._reporting.phases("data"):
                found = poll(_LATE_S)
            self._late_s += time.perf_counter() - start_s
        if found is not None:  # a batch that never comes has kept no step waiting
            self._reporting.data_wait_s += self._late_s
            if is_first:
                self.first_s = self._late_s
            self._late_s = 0.0
        return found
