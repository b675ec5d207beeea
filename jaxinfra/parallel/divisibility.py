"""Whether a run fits its mesh: every sharded dimension divides, and every mesh axis has a use. Imports no JAX."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxinfra.config import Problem
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.schedules import PipelineConfig

type ShardedDims = Mapping[str, tuple[int, str]]
"""Path of a config field to its size and the logical axis of the dimension."""


@dataclass(frozen=True, kw_only=True)
class MeshFit:
    """A run as its mesh sees it.

    Attributes:
        mesh: the sizes of the mesh axes, none of them -1.
        rules: logical axis to mesh axes.
        pipeline: how microbatches pass the stages.
        global_batch: samples of a step.
        accumulate: microbatches of a step.
        sharded_dims: those of the model and of the data.
        positions: of the activations of one sample.
        by_position: whether the objective adds up single positions.
        pipeline_layers: layers that stages can share.
        modality: what a sample is made of.
    """

    mesh: MeshConfig
    rules: ShardingRules
    pipeline: PipelineConfig
    global_batch: int
    accumulate: int
    sharded_dims: ShardedDims
    positions: int
    by_position: bool
    pipeline_layers: int
    modality: str

    def problems(self) -> Iterable[Problem]:
        """Yields each dimension that does not divide, and each axis without a use, with paths from the run."""
        yield from self._unused_axes()
        yield from self._batch()
        for path, (size, axis) in self.sharded_dims.items():
            axes = self.rules.mesh_axes(axis)
            if size % self._shards(axes):
                yield self._division_problem(path, size, axes)
            elif axis == "positions":
                yield from self._blocks(path, size)
        if self.mesh.stage > 1:
            yield from self._stages()

    def loss_dim(self) -> int | None:
        """The dimension of the activations by which pipeline stages share the loss: 0 rows, 1 positions, or None."""
        if self.global_batch % (self._batch_parts() * self.mesh.stage) == 0:
            return 0
        shards = self._shards(self.rules.sequence) * self.mesh.stage
        return 1 if self.by_position and self.positions % shards == 0 else None

    def loss_positions(self) -> int | None:
        """Positions of a sequence on one device in the loss, where a sequence is sharded and divides; else None."""
        in_stages = self.mesh.stage > 1 and self.loss_dim() == 1
        shards = self._shards(self.rules.sequence) * (self.mesh.stage if in_stages else 1)
        return self.positions // shards if shards > 1 and self.positions % shards == 0 else None

    def _shards(self, axes: Sequence[str]) -> int:
        return math.prod(getattr(self.mesh, axis) for axis in axes)

    def _sharded(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The config fields of those axes that have more than one device."""
        return tuple(f"mesh.{axis}" for axis in axes if getattr(self.mesh, axis) > 1)

    def _batch_parts(self) -> int:
        return self._shards(self.rules.batch) * self.accumulate

    def _unused_axes(self) -> Iterable[Problem]:
        if self.mesh.replica > 1 and "replica" not in (*self.rules.batch, *self.rules.sequence):
            yield Problem(
                fields=("mesh.replica", "rules.batch"),
                message="every replica would do the same work",
                fix=f"use rules.batch=(replica,{','.join(self.rules.batch)})",
            )
        if any(axis == "positions" for _, axis in self.sharded_dims.values()):
            if self.mesh.context > 1 and "context" not in self.rules.sequence:
                yield Problem(
                    fields=("mesh.context", "rules.sequence"),
                    message="the context axis shards sequences and nothing else",
                    fix="use rules.sequence=(context,)",
                )
        elif self._shards(self.rules.sequence) > 1 or self.mesh.context > 1:
            yield Problem(
                fields=("rules.sequence", *self._sharded(self.rules.sequence)),
                message=f"{self.modality}s are no sequences that this model can shard",
                fix="use rules.sequence=(context,) mesh.context=1",
            )

    def _batch(self) -> Iterable[Problem]:
        parts = self._batch_parts()
        if self.global_batch % parts:
            accumulated = ("train.accumulate",) if self.accumulate > 1 else ()
            yield Problem(
                fields=("train.global_batch", *accumulated, *self._sharded(self.rules.batch)),
                message=f"the batch does not divide into {parts} equal parts",
                fix=f"use train.global_batch={_rounded_up(self.global_batch, parts)}",
            )

    def _blocks(self, path: str, length: int) -> Iterable[Problem]:
        """Every shard of a sequence has an early and a late block (see `parallel.context`)."""
        shards = self._shards(self.rules.sequence)
        if shards > 1 and self.by_position and length % (2 * shards):
            fitting = math.lcm(2 * shards, self._shards(self.rules.mesh_axes("positions")))
            yield Problem(
                fields=(path, *self._sharded(self.rules.sequence)),
                message=f"{shards} shards have two blocks each, and {2 * shards} do not divide {length} positions",
                fix=f"use {path}={_rounded_up(length, fitting)}",
            )

    def _stages(self) -> Iterable[Problem]:
        if not self.pipeline_layers:
            yield Problem(
                fields=("mesh.stage", "model"),
                message="the model has no stacked layers for pipeline stages to share",
                fix="use mesh.stage=1",
            )
            return
        chunks = self.mesh.stage * self.pipeline.chunks
        if self.pipeline_layers < chunks:
            yield Problem(
                fields=("model.num_layers", "mesh.stage", "pipeline.chunks"),
                message=f"there are fewer layers than the {chunks} chunks of all stages",
                fix=f"use model.num_layers={chunks} or fewer stages",
            )
        if self.pipeline.schedule == "interleaved" and self.accumulate % self.mesh.stage:
            yield Problem(
                fields=("train.accumulate", "mesh.stage", "pipeline.schedule"),
                message="the interleaved schedule takes as many microbatches at a time as there are stages",
                fix=f"use train.accumulate={_rounded_up(self.accumulate, self.mesh.stage)}",
            )
        if self.loss_dim() is None:
            rows = self._batch_parts() * self.mesh.stage
            yield Problem(
                fields=("train.global_batch", "train.accumulate", "mesh.stage"),
                message="stages can share neither the rows of a microbatch nor its positions for the loss",
                fix=f"use train.global_batch={_rounded_up(self.global_batch, rows)}",
            )

    def _division_problem(self, path: str, size: int, axes: Sequence[str]) -> Problem:
        shards, sharded = self._shards(axes), self._sharded(axes)
        fix = f"{path}={_rounded_up(size, shards)}"
        if len(sharded) == 1:
            fix = self._smaller(sharded[0].removeprefix("mesh."), math.gcd(size, shards))
        message = f"{shards} shards do not divide {size} {path.split('.')[-1].removeprefix('num_')}"
        return Problem(fields=(path, *sharded), message=message, fix=f"use {fix}")

    def _smaller(self, axis: str, size: int) -> str:
        """Overrides that shrink a mesh axis and give its devices to data parallelism, the batch rounded up to fit."""
        freed = getattr(self.mesh, axis) // size
        embed = [size for size, name in self.sharded_dims.values() if name == "embed"]
        to_fsdp = axis != "fsdp" and all(size % (self.mesh.fsdp * freed) == 0 for size in embed)
        into = "fsdp" if to_fsdp else "replica"
        parts = self._batch_parts() * (1 if axis in self.rules.batch else freed)
        overrides = [f"mesh.{axis}={size}", f"mesh.{into}={getattr(self.mesh, into) * freed}"]
        if self.global_batch % parts:
            overrides.append(f"train.global_batch={_rounded_up(self.global_batch, parts)}")
        return " ".join(overrides)


def _rounded_up(size: int, parts: int) -> int:
    return -(-size // parts) * parts
