"""Waits for the batch of the next step, and counts the seconds in which the devices have nothing to do meanwhile."""

import time
from collections.abc import Callable

import jax

from jaxinfra.train.reporting import Reporting

type NextBatch = tuple[int, dict[str, jax.Array]]
"""The number of steps before a batch, and the batch on the devices."""
type Poll = Callable[[float], NextBatch | None]
"""Waits for the next batch for a number of seconds; returns None if it has not come in time."""

_LATE_S, _BUSY_S = 0.1, 0.001
"""Longest waits for a batch before the loop looks at requests, and while the devices are busy."""


class Waiting:
    """Waits for batches, and adds the idle seconds to `Reporting.data_wait_s` once the batch has come.

    Attributes:
        first_s: seconds of waiting for the first batch, which nothing can read ahead.
    """

    def __init__(self, reporting: Reporting) -> None:
        self._reporting = reporting
        self.first_s = 0.0

    def next_batch(self, poll: Poll, act: Callable[[], str | None], *, is_first: bool) -> NextBatch | str:
        """Returns the next batch, or the reason to stop before it.

        The phase is "data" as long as a batch is late, so that the watchdog ends a run whose batch never comes.

        Args:
            poll: see `Poll`.
            act: acts on requests while the batch is late; returns the reason to stop, or None.
            is_first: whether it is the first batch of this training.
        """
        found = poll(0.0)
        while found is None and self._reporting.devices_are_busy:
            found = poll(_BUSY_S)
        if found is not None:
            return found
        start_s = time.perf_counter()
        with self._reporting.phases("data"):
            while (found := poll(_LATE_S)) is None:
                if (reason := act()) is not None:  # a batch that never comes has kept no step waiting
                    return reason
        late_s = time.perf_counter() - start_s
        self._reporting.data_wait_s += late_s
        if is_first:
            self.first_s = late_s
        return found
