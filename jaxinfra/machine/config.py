"""When the steps of a run are profiled. Imports no JAX."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveInt


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """When the steps of a run are profiled; see docs/watch.md.

    Attributes:
        at: completed steps after which a profile begins; None begins one only on the signal SIGUSR2. The first step of
            a process is never profiled, as it compiles.
        steps: number of steps in a profile.
    """

    at: PositiveInt | None = None
    steps: PositiveInt = 3

    def problems_in_run(self, total_steps: int, prefix: str) -> Iterable[Problem]:
        """Yields a problem if the profile goes beyond the last step; `prefix` is the path of this config."""
        if self.at is None or self.at + self.steps <= total_steps:
            return
        latest = total_steps - self.steps
        fix = f"{prefix}at={latest}" if latest >= 1 else f"{prefix}at=none"
        yield Problem(
            fields=(f"{prefix}at", f"{prefix}steps", "train.steps"),
            message="the profile would go beyond the last step",
            fix=f"use {fix}",
        )
