"""What the parts of `bench accelerator` share: their cases, and the time of a call on devices that work ahead."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import jax

from jaxinfra.processes.peers import current_peers
from tests.bench.table import Columns, TableRow

CALL_LIMIT_S = 5.0
"""Longest time to repeat one call; one that takes longer is timed once."""
CALLS_PER_ROUND = 5
"""Calls that a round of an accelerator queues before it waits; devices then do not wait for the host."""


class NotMeasuredError(Exception):
    """A case cannot be measured here; the message says why."""


class Case(NamedTuple):
    """A thing to measure: its title, and a function that returns its row without the title."""

    title: str
    measure: Callable[[], TableRow]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the sizes of all cases.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        rounds: the most rounds of a measurement.
        overrides: of the runs of the part "models".
        folder: where the part "save" saves to; None is a temporary folder.
    """

    platform: str
    rounds: int
    overrides: tuple[str, ...] = ()
    folder: str | None = None

    @property
    def is_small(self) -> bool:
        """Whether cases are tiny, since a CPU emulates the devices."""
        return self.platform == "cpu"

    def seconds(self, call: Callable[[], object]) -> float:
        """Returns the median seconds of a call; the first, which compiles, and the second are not timed.

        All processes make the same number of calls.
        """
        jax.block_until_ready(call())
        calls = 1 if self.is_small else CALLS_PER_ROUND  # emulated devices run one program at a time

        def time_round() -> float:
            start_s = time.perf_counter()
            output = None
            for _ in range(calls):
                output = call()
            jax.block_until_ready(output)
            return (time.perf_counter() - start_s) / calls

        first_s = time_round()
        fitting = min(self.rounds, int(CALL_LIMIT_S / (calls * first_s)))
        rounds = current_peers().broadcast(fitting)
        return median([time_round() for _ in range(rounds)] or [first_s])


class Part(NamedTuple):
    """A part of the benchmark.

    Attributes:
        columns: of its table, besides the title and the note.
        budget_s: seconds after which no further case begins.
        cases: yields the cases; the later ones may be left out.
    """

    columns: Columns
    budget_s: float
    cases: Callable[[Setting], Iterable[Case]]


def unmeasured(title: str, reason: str) -> Iterator[Case]:
    """Yields a case that only says why it is not measured."""

    def measure() -> TableRow:
        raise NotMeasuredError(reason)

    yield Case(title, measure)
