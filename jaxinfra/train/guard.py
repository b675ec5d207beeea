"""Watches the losses of a run for steps that were skipped and for spikes, and says when to go back to a checkpoint.

The train step skips the update if its loss or gradient is not finite (`GuardConfig.skip_nonfinite`). All processes see
the same losses, so they decide the same. Decisions are in the run record: the batches that are left out become
`train.skip_batches`, so a resumed run and a replay leave out the same ones.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from jaxinfra.errors import NonFiniteError
from jaxinfra.run import GuardConfig
from jaxinfra.track.formatting import format_metric

_log = logging.getLogger(__name__)
_TO_STANDARD = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_DEVIATION = 1e-3
"""Smallest deviation that counts, relative to the median: losses that hardly vary have no spikes."""


class Rewind(NonFiniteError):
    """Ends the steps of a run, to go on from an earlier checkpoint; outside of `Trainer.train` it ends the run.

    Attributes:
        step: number of steps that were completed, the bad ones included.
        cause: what was bad, for people.
    """

    def __init__(self, step: int, cause: str) -> None:
        super().__init__(f"step {step}: {cause}")
        self.step, self.cause = step, cause


class Decision(NamedTuple):
    """A decision to go back."""

    step: int  # number of steps that were completed then
    to: int  # number of completed steps of the checkpoint that the run goes back to; 0 for its start
    skip: tuple[int, int]  # the range of batches, from the first to one past the last, that are left out from now on
    cause: str  # what was bad


class Guard:
    """Looks at each step of a run, in order."""

    def __init__(self, config: GuardConfig, history: Mapping[str, Any] | None = None) -> None:
        """Goes on from a `history`, which is saved with each checkpoint."""
        history = history or {"losses": [], "skipped": 0}
        self._config = config
        self._losses = deque[float](history["losses"], maxlen=config.window)
        self.skipped: int = history["skipped"]
        """Number of skipped steps up to the last one, in a row."""

    @property
    def history(self) -> dict[str, Any]:
        """The losses and counts from which the next start decides the same, as JSON."""
        return {"losses": [*self._losses] if self._config.spike is not None else [], "skipped": self.skipped}

    def look(self, step: int, loss: float, *, skipped: bool) -> None:
        """Looks at a completed step, counted from 1; raises Rewind if the run must go back."""
        self.skipped = self.skipped + 1 if skipped else 0
        if skipped:
            if self.skipped == 1:
                _log.warning("step %d: the loss (%s) or the gradient is not finite; its update is skipped", step, loss)
            if self.skipped >= self._config.max_nonfinite:
                raise Rewind(step, f"the loss or the gradient was not finite in {self.skipped} steps in a row")
        elif (cause := self._spike(loss)) is not None:
            raise Rewind(step, cause)
        else:
            self._losses.append(loss)

    def _spike(self, loss: float) -> str | None:
        """Returns what is wrong with a loss; None if it is no spike (`GuardConfig.spike`)."""
        if self._config.spike is None or len(self._losses) < self._config.window:
            return None
        middle = median(self._losses)
        deviation = _TO_STANDARD * median(abs(each - middle) for each in self._losses)
        deviation = max(deviation, _LEAST_DEVIATION * abs(middle))
        if loss <= middle + self._config.spike * deviation:
            return None
        above = f"{(loss - middle) / deviation:.1f} deviations above its median {format_metric(middle)}"
        return f"the loss {format_metric(loss)} is {above}"


def with_decisions(
    skip_batches: Sequence[tuple[int, int]], decisions: Sequence[Decision]
) -> tuple[tuple[int, int], ...]:
    """Returns the ranges of batches to leave out, joined where they touch or overlap."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted({*map(tuple, skip_batches), *(each.skip for each in decisions)}):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return tuple(joined)
