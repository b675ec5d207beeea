"""When checkpoints are saved and which are kept. Imports no JAX."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxinfra.config import Problem
from jaxinfra.config.limits import NonEmptyStr, PositiveFloat, PositiveInt
from jaxinfra.storage.location import is_remote

type Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        save_every: steps between two saves; auto for as many as lose least time, from the measured stall of a save and
            the expected time between failures, a week at most.
        chip_hours_per_loss: for `save_every=auto`: hours of use after which one chip or its host is expected to fail.
            The default is what the training of Llama 3 saw, 419 losses in 54 days on 16,384 GPUs.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keeps the checkpoints whose step is a multiple of this, forever.
        keep_best: also keeps this number of checkpoints with the best `best_metric`, of those saved after an
            evaluation.
        best_metric: name of a metric of the evaluation, such as "loss".
        best_is: whether the lowest or the highest value is the best.
        async_save: writes checkpoints in the background while training continues.
        compress: compresses checkpoints on a disk with zstd. Float32 weights get 8 % smaller, and a save takes twice as
            long.
        local: a folder on each host's own disk or in its memory, such as /dev/shm/jaxinfra, for copies of the state
            between two checkpoints; none for no copies.
        local_every: steps between two copies.
        init_key: the public key, a PEM file, with which `init=hf:DIR` is verified before it is read.
    """

    save_every: PositiveInt | Literal["auto"] = 100
    chip_hours_per_loss: PositiveFloat = 50_000.0
    keep_last: PositiveInt = 2
    keep_every: PositiveInt | None = None
    keep_best: PositiveInt | None = None
    best_metric: str = "loss"
    best_is: Literal["lowest", "highest"] = "lowest"
    async_save: bool = True
    compress: bool = False
    local: NonEmptyStr | None = None
    local_every: PositiveInt = 10
    init_key: NonEmptyStr | None = None

    def due_after(self, step: int) -> Literal["checkpoint", "copy"] | None:
        """Returns what is saved after a step, counted from 1; with `save_every=auto` only copies are (`Cadence`)."""
        if self.save_every != "auto" and step % self.save_every == 0:
            return "checkpoint"
        return "copy" if self.local is not None and step % self.local_every == 0 else None

    def superseded(self, steps: Mapping[int, Metrics]) -> list[int]:
        """Returns the steps that need not be kept, ascending.

        Args:
            steps: the intact checkpoints, with the metrics of their evaluations. Damaged ones are not counted, so there
                are never fewer intact ones than asked for.
        """
        ordered, name = sorted(steps), self.best_metric
        kept = {*ordered[-self.keep_last :]}
        if self.keep_every is not None:
            kept |= {step for step in ordered if step % self.keep_every == 0}
        if self.keep_best is not None:
            sign = 1 if self.best_is == "lowest" else -1
            # Of equal values the newer step is better: the steps are negative.
            ranked = sorted((sign * steps[step][name], -step) for step in ordered if name in steps[step])
            kept |= {-step for _, step in ranked[: self.keep_best]}
        return [step for step in ordered if step not in kept]

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `keep_every` names steps that are never saved, or copies are in vain."""
        if self.keep_every and self.save_every == "auto":
            yield Problem(
                fields=("keep_every", "save_every"),
                message="keep_every must be a multiple of save_every, which is not known ahead with auto",
                fix=f"use save_every={self.keep_every}",
            )
        if self.keep_best and self.save_every == "auto":
            yield Problem(
                fields=("keep_best", "save_every"),
                message="the best are of checkpoints that are saved after an evaluation, which auto does not look at",
                fix="use save_every=STEPS, a multiple of train.eval_every",
            )
        if self.keep_every and self.save_every != "auto" and self.keep_every % self.save_every:
            rounded = -(-self.keep_every // self.save_every) * self.save_every
            yield Problem(
                fields=("keep_every", "save_every"),
                message="keep_every must be a multiple of save_every: other steps are never saved",
                fix=f"use keep_every={rounded}",
            )
        if self.local is not None and is_remote(self.local):
            yield Problem(
                fields=("local",),
                message=f"{self.local} is a URL, but copies are for the host's own disk or memory",
                fix="use local=/dev/shm/jaxinfra",
            )
        if self.local is not None and self.save_every != "auto" and self.local_every >= self.save_every:
            yield Problem(
                fields=("local_every", "save_every"),
                message="copies are saved between two checkpoints, so local_every must be less than save_every",
                fix=f"use local_every={max(1, self.save_every // 10)}" if self.save_every > 1 else "use local=none",
            )
