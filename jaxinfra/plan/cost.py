"""Estimates days, chip-hours, dollars and energy of training on a number of tokens, each where its row exists."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfra.machine.chips import Chip
from jaxinfra.plan.estimate import StepPlan
from jaxinfra.track.goodput import best_interval_s, expected_goodput

_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Losses:
    """How often hardware is lost, and what a loss and a save take.

    Attributes:
        per_chip_hour: losses of any chip or host that end an attempt, by chip and hour.
        save_s: time for which a save stalls training.
        restart_s: time from a loss to the next step.
    """

    per_chip_hour: float
    save_s: float
    restart_s: float

    def goodput(self, chips: int) -> float:
        """Returns the part of the time that trains, with the saves that lose least (`track.goodput`)."""
        loss_s = _HOUR_S / (self.per_chip_hour * chips)
        return expected_goodput(best_interval_s(self.save_s, loss_s), self.save_s, self.restart_s, loss_s)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a whole run. `days` are those on chips that are never lost, `spot_days` those on spot chips."""

    steps: int
    days: float
    chip_hours: float
    goodput: float | None  # of chips that are lost, None if their losses are not known
    spot_days: float | None
    dollars: Mapping[str, float]  # by price of the chip's row
    kwh: float | None


def cost_of(plan: StepPlan, chip: Chip, tokens: float, *, losses: Losses | None, pue: float) -> Cost:
    """Returns the cost of training on so many tokens.

    Spot chips are paid while they are lost time, too; without known losses their price is taken as if none were lost.
    `pue` is the energy of the building over that of its machines.
    """
    steps = math.ceil(tokens / (plan.samples * plan.units_per_sample))
    hours = steps * plan.estimate_s / _HOUR_S
    goodput = None if losses is None else losses.goodput(plan.chips)
    spot_hours = hours / goodput if goodput else None
    dollars = {
        name: price * plan.chips * (spot_hours if name == "spot" and spot_hours is not None else hours)
        for name, price in chip.dollars.items()
        if name != "spot" or goodput != 0.0
    }
    watts = None if chip.watts is None else chip.watts * plan.devices * pue
    return Cost(
        steps=steps,
        days=hours / 24,
        chip_hours=hours * plan.chips,
        goodput=goodput,
        spot_days=None if spot_hours is None else spot_hours / 24,
        dollars=dollars,
        kwh=None if watts is None else watts * hours / 1000,
    )
