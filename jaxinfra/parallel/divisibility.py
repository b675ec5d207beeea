"""Checks that a config fits its mesh: dimensions are divisible and all mesh axes are used. Imports no JAX."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxinfra.config import Problem
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.schedules import PipelineConfig

type ShardedDims = Mapping[str, tuple[int, str]]
"""Maps the path of a config field to its size and the logical axis of the dimension."""


@dataclass(frozen=True, kw_only=True)
class MeshFit:
    """The sizes of a run that must be divisible by mesh axes.

    Attributes:
        mesh: sizes of the mesh axes; none is -1.
        rules: maps logical axes to mesh axes.
        pipeline: the pipeline schedule.
        global_batch: number of samples per step.
        accumulate: number of microbatches per step.
        sharded_dims: sharded dimensions of the model and the data.
        positions: number of positions in the activations of one sample.
        by_position: whether the objective is a sum over positions.
        pipeline_periods: number of periods (repeated groups of layers, often of one) that stages split; 0 if the model
            cannot be split.
        modality: "token" or "image".
    """

    mesh: MeshConfig
    rules: ShardingRules
    pipeline: PipelineConfig
    global_batch: int
    accumulate: int
    sharded_dims: ShardedDims
    positions: int
    by_position: bool
    pipeline_periods: int
    modality: str

    def problems(self) -> Iterable[Problem]:
        """Yields dimensions that are not divisible, and unused mesh axes; field paths start at the run."""
        yield from self._unused_axis_problems()
        yield from self._batch_problems()
        for path, (size, axis) in self.sharded_dims.items():
            axes = self.rules.mesh_axes(axis)
            if size % self.mesh.shards(*axes):
                yield self._division_problem(path, size, axes)
            elif axis == "positions":
                yield from self._zigzag_problems(path, size)
        if self.mesh.stage > 1:
            yield from self._stage_problems()

    def loss_dim(self) -> int | None:
        """Returns the dimension of a microbatch that stages shard for the head and the loss.

        It is 0 (rows) if the rows divide evenly, else 1 (positions), or None if neither does.
        """
        if self.global_batch % (self._batch_divisor() * self.mesh.stage) == 0:
            return 0
        shards = self.mesh.shards(*self.rules.sequence) * self.mesh.stage
        return 1 if self.by_position and self.positions % shards == 0 else None

    def loss_positions(self) -> int | None:
        """Returns the positions of a sequence per device in the loss; None if they are not sharded, or unevenly."""
        in_stages = self.mesh.stage > 1 and self.loss_dim() == 1
        shards = self.mesh.shards(*self.rules.sequence) * (self.mesh.stage if in_stages else 1)
        return self.positions // shards if shards > 1 and self.positions % shards == 0 else None

    def _mesh_fields(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Returns the config fields of the axes that have more than one device."""
        return tuple(f"mesh.{axis}" for axis in axes if getattr(self.mesh, axis) > 1)

    def _batch_divisor(self) -> int:
        """Returns what the global batch must be divisible by: batch shards x microbatches."""
        return self.mesh.shards(*self.rules.batch) * self.accumulate

    def _unused_axis_problems(self) -> Iterable[Problem]:
        if self.mesh.replica > 1 and "replica" not in (*self.rules.batch, *self.rules.sequence):
            fields, message = ("mesh.replica", "rules.batch"), "all replicas would do the same work"
            yield Problem(fields=fields, message=message, fix=f"use rules.batch=(replica,{','.join(self.rules.batch)})")
        if any(axis == "positions" for _, axis in self.sharded_dims.values()):
            if self.mesh.context > 1 and "context" not in self.rules.sequence:
                fields, message = ("mesh.context", "rules.sequence"), "mesh axis context may shard only sequences"
                yield Problem(fields=fields, message=message, fix="use rules.sequence=(context,)")
        elif self.mesh.shards(*self.rules.sequence) > 1 or self.mesh.context > 1:
            fields = ("rules.sequence", *self._mesh_fields(self.rules.sequence))
            message = f"this model cannot shard the positions of {self.modality}s"
            yield Problem(fields=fields, message=message, fix="use rules.sequence=(context,) mesh.context=1")

    def _batch_problems(self) -> Iterable[Problem]:
        parts = self._batch_divisor()
        if self.global_batch % parts:
            accumulated = ("train.accumulate",) if self.accumulate > 1 else ()
            yield Problem(
                fields=("train.global_batch", *accumulated, *self._mesh_fields(self.rules.batch)),
                message=f"not divisible by {parts} (batch shards x microbatches)",
                fix=f"use train.global_batch={_rounded_up(self.global_batch, parts)}",
            )

    def _zigzag_problems(self, path: str, length: int) -> Iterable[Problem]:
        """Yields a length that cannot be cut into an early and a late block for each shard (`parallel.context`)."""
        shards = self.mesh.shards(*self.rules.sequence)
        if shards > 1 and self.by_position and length % (2 * shards):
            fitting = math.lcm(2 * shards, self.mesh.shards(*self.rules.mesh_axes("positions")))
            fields = (path, *self._mesh_fields(self.rules.sequence))
            message = f"{length} positions are not divisible by {2 * shards}, two blocks for each of {shards} shards"
            yield Problem(fields=fields, message=message, fix=f"use {path}={_rounded_up(length, fitting)}")

    def _stage_problems(self) -> Iterable[Problem]:
        if not self.pipeline_periods:
            message = "the model has no stacked layers for pipeline stages"
            yield Problem(fields=("mesh.stage", "model"), message=message, fix="use mesh.stage=1")
            return
        if self.pipeline.schedule == "interleaved" and self.accumulate % self.mesh.stage:
            yield Problem(
                fields=("train.accumulate", "mesh.stage", "pipeline.schedule"),
                message="the interleaved schedule needs a multiple of mesh.stage microbatches",
                fix=f"use train.accumulate={_rounded_up(self.accumulate, self.mesh.stage)}",
            )
        if self.loss_dim() is None:
            rows = self._batch_divisor() * self.mesh.stage
            yield Problem(
                fields=("train.global_batch", "train.accumulate", "mesh.stage"),
                message="stages cannot shard the rows or the positions of a microbatch evenly for the loss",
                fix=f"use train.global_batch={_rounded_up(self.global_batch, rows)}",
            )

    def _division_problem(self, path: str, size: int, axes: Sequence[str]) -> Problem:
        shards, sharded = self.mesh.shards(*axes), self._mesh_fields(axes)
        fix = f"{path}={_rounded_up(size, shards)}"
        if len(sharded) == 1:
            fix = self._shrink_axis(sharded[0].removeprefix("mesh."), math.gcd(size, shards))
        name = path.split(".")[-1].removeprefix("num_")
        message = f"{size} {name} not divisible by {shards} shards"
        return Problem(fields=(path, *sharded), message=message, fix=f"use {fix}")

    def _shrink_axis(self, axis: str, size: int) -> str:
        """Returns overrides that shrink a mesh axis to `size` in favor of data parallelism, with a batch that fits.

        For 6 heads on `mesh.tensor=4 mesh.fsdp=2` they are `mesh.tensor=2 mesh.fsdp=4`.
        """
        freed = getattr(self.mesh, axis) // size  # by this factor another axis grows
        embed_sizes = [size for size, name in self.sharded_dims.values() if name == "embed"]
        fits_fsdp = axis != "fsdp" and all(size % (self.mesh.fsdp * freed) == 0 for size in embed_sizes)
        enlarged = "fsdp" if fits_fsdp else "replica"
        # The freed devices shard the batch from now on, unless they did so before.
        parts = self._batch_divisor() * (1 if axis in self.rules.batch else freed)
        overrides = [f"mesh.{axis}={size}", f"mesh.{enlarged}={getattr(self.mesh, enlarged) * freed}"]
        if self.global_batch % parts:
            overrides.append(f"train.global_batch={_rounded_up(self.global_batch, parts)}")
        return " ".join(overrides)


def _rounded_up(size: int, parts: int) -> int:
    return -(-size // parts) * parts
