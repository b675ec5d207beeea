"""How often checkpoints are saved: every so many steps, or as often as loses least time. Imports no JAX."""

from collections.abc import Callable
from typing import Literal

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.track.goodput import best_interval_s

_FIRST_STEPS = 20
"""Steps from a start to the first save of `save_every=auto`, which is measured."""
_LONGEST_LOSS_S = 7 * 24 * 3600.0
"""One host alone is expected to be lost once a week."""


class Cadence:
    """Says after which steps a run saves.

    `start_step` is the number of steps that the state was trained for, `devices` those of the run. `broadcast` returns
    the value of process 0: all processes must save after the same steps.
    """

    def __init__(
        self, config: CheckpointConfig, start_step: int, devices: int, broadcast: Callable[[int], int] = lambda x: x
    ) -> None:
        self._config, self._broadcast = config, broadcast
        self._loss_s = min(_LONGEST_LOSS_S, config.chip_hours_per_loss * 3600 / devices)
        self._next = start_step + _FIRST_STEPS
        self._every = 0  # steps, as the last line says

    def after(self, step: int) -> Literal["checkpoint", "copy"] | None:
        """Returns what is due after a step, counted from 1."""
        if self._config.save_every != "auto":
            return self._config.due_after(step)
        return "checkpoint" if step == self._next else self._config.due_after(step)

    def saved(self, step: int, stall_s: float, step_s: float | None) -> str | None:
        """Decides when the next checkpoint is saved, given for how long the loop has waited for this one.

        All processes must call it after the same step. `step_s` is the time of a step, None if it is not known yet.
        Returns a line for people if the cadence is new.
        """
        if self._config.save_every != "auto":
            return None
        every = _FIRST_STEPS
        if step_s:
            every = max(1, round(best_interval_s(stall_s, self._loss_s) / step_s))
        every = self._broadcast(every)
        self._next = step + every
        if not step_s or self._every / 2 < every < self._every * 2:
            return None
        self._every = every
        return (
            f"saves every {every:,} steps ({every * step_s:,.0f} s): a save stalls training for {stall_s:.2f} s, and a "
            f"loss is expected every {self._loss_s / 3600:,.0f} hours"
        )
