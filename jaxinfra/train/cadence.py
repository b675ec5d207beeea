"""How often checkpoints are saved: every so many steps, or as often as loses least time. Imports no JAX."""

from collections.abc import Callable
from typing import Literal

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.track.goodput import best_interval_s

_FIRST_STEPS = 20
"""Steps from a start to the first save of `save_every=auto`, which is measured, and from a save that failed."""
_MAX_MTBF_S = 7 * 24 * 3600.0
"""Some host is expected to fail at least once a week, however few there are."""


class Cadence:
    """Says after which steps a run saves.

    `start_step` is the number of steps that the state was trained for, `devices` those of the run. `broadcast` returns
    the value of process 0: all processes must save after the same steps.
    """

    def __init__(
        self, config: CheckpointConfig, start_step: int, devices: int, broadcast: Callable[[int], int] = lambda x: x
    ) -> None:
        self._config, self._broadcast = config, broadcast
        self._mtbf_s = min(_MAX_MTBF_S, config.chip_hours_per_loss * 3600 / devices)
        self._last, self._next = start_step, start_step + _FIRST_STEPS
        self._stall_s = float("inf")  # of a save that does not wait for the one before
        self._write_s = 0.0  # that a save takes in the background, as far as it was noticed
        self._announced = 0  # steps

    def due_after(self, step: int) -> Literal["checkpoint", "copy"] | None:
        """Returns what is due after a step, counted from 1."""
        if self._config.save_every != "auto":
            return self._config.due_after(step)
        return "checkpoint" if step >= self._next else self._config.due_after(step)

    def measured(self, step: int, stall_s: float, step_s: float | None, *, saved: bool) -> str | None:
        """Decides when the next checkpoint is saved, given for how long this one has stalled the loop.

        All processes must call it after the same step. `step_s` is the time of a step, None if it is not known yet;
        `saved` is whether a checkpoint was saved. Returns a line for people if the cadence is new.
        """
        if self._config.save_every != "auto":
            return None
        every = _FIRST_STEPS
        if saved and step_s:
            self._stall_s = min(self._stall_s, stall_s)
            if (waited_s := stall_s - self._stall_s) > self._stall_s:  # for the write of the save before
                self._write_s = max(self._write_s, (step - self._last) * step_s + waited_s)
            every = max(1, round(max(best_interval_s(self._stall_s, self._mtbf_s), self._write_s) / step_s))
        every = self._broadcast(every)
        self._last, self._next = step, step + every
        if not (saved and step_s) or self._announced / 2 < every < self._announced * 2:
            return None
        self._announced = every
        return (
            f"saves every {every:,} steps ({every * step_s:,.0f} s): a save stalls training for {self._stall_s:.2f} s, "
            f"and a failure is expected every {self._mtbf_s / 3600:,.0f} hours"
        )
