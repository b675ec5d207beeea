"""When checkpoints are saved and which are kept. Imports no JAX."""

from collections.abc import Iterable
from dataclasses import dataclass

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        every: steps between two saves.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep, for good, those whose step is a multiple of this.
        asynchronous: train on while a checkpoint is being written.
    """

    every: Count = 100
    keep_last: Count = 2
    keep_every: Count | None = None
    asynchronous: bool = True

    def problems(self) -> Iterable[Problem]:
        """A `keep_every` that would keep nothing or less than it says."""
        if self.keep_every and self.keep_every % self.every:
            rounded = -(-self.keep_every // self.every) * self.every
            yield Problem(
                fields=("keep_every", "every"),
                message="keep_every must be a multiple of every: other steps are never saved",
                fix=f"use keep_every={rounded}",
            )
