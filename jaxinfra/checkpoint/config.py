"""When checkpoints are saved and which are kept. Imports no JAX."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveInt


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        save_every: steps between two saves.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keeps the checkpoints whose step is a multiple of this, forever.
        keep_best: also keeps this number of checkpoints with the best `best_metric`, of those saved after an
            evaluation.
        best_metric: name of a metric of the evaluation, such as "loss".
        best_is: whether the lowest or the highest value is the best.
        async_save: writes checkpoints in the background while training continues.
        compress: compresses checkpoints on a disk with zstd. Float32 weights get 8 % smaller, and a save takes twice as
            long.
    """

    save_every: PositiveInt = 100
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    keep_best: PositiveInt | None = None
    best_metric: str = "loss"
    best_is: Literal["lowest", "highest"] = "lowest"
    async_save: bool = True
    compress: bool = False

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `keep_every` names steps that are never saved."""
        if self.keep_every and self.keep_every % self.save_every:
            rounded = -(-self.keep_every // self.save_every) * self.save_every
            yield Problem(
                fields=("keep_every", "save_every"),
                message="keep_every must be a multiple of save_every: other steps are never saved",
                fix=f"use keep_every={rounded}",
            )
