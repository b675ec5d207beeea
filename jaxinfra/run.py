"""`Run`, the typed top of a config, and what only shows where two of its parts meet; `session.train` trains it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Annotated, Literal, NamedTuple

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.config import NOT_FINGERPRINTED, Loaded, Problem, fingerprint
from jaxinfra.config.source import COMMAND_LINE
from jaxinfra.data.image_data import ImageData
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.data.mixture import Mixture
from jaxinfra.data.tokens import TokenData
from jaxinfra.errors import ConfigError
from jaxinfra.models.model import ModelConfig
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.optim.optimizers import OptimConfig
from jaxinfra.optim.schedules import schedule_problems
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize, ShardingRules
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.tasks.causal_lm import CausalLM
from jaxinfra.tasks.classification import Classification
from jaxinfra.tasks.task import Task
from jaxinfra.track.tracker import TrackConfig
from jaxinfra.train.loop import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats.

    Attributes:
        params: what parameters are stored in between steps.
        compute: what weights and activations are cast to in the model; losses, norms and sums are float32.
        quantize: what the factors of the layers' products with weights are rounded to, forward and backward (see
            `ops.quantized`); embedding and head stay as they are.
    """

    params: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Quantize = "none"

    def problems(self) -> Iterable[Problem]:
        """Quantized products have what makes them."""
        if self.quantize != "none" and find_spec("qwix") is None:
            yield Problem(
                fields=("quantize",),
                message="quantized products are made by qwix, which is not installed",
                fix="run pip install qwix, or install jaxinfra with its extra quantized",
            )


class Parts(NamedTuple):
    """The model, task and data of a run, as all else knows them: that they are of one kind is all that there is."""

    model: ModelConfig
    task: Task
    data: DataConfig


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a run is.

    Fields marked `NOT_FINGERPRINTED`, here and below, change where and how fast a run goes, or in what order it rounds,
    but not the numbers it is after. The store is known by its fingerprint, not by its place.

    Attributes:
        name: of its directory.
        root: where run directories stand.
        seed: of the first parameters, and of dropout.
        model: the shape of the network.
        task: what it is trained for.
        data: what it is trained on.
        precision: number formats.
        mesh: how the devices are arranged.
        rules: which arrays are spread over which mesh axes.
        pipeline: how microbatches pass the stages, where mesh.stage is above 1.
        optim: how parameters move.
        train: how long, in what batches.
        checkpoint: when the state is saved.
        track: where metrics go.
    """

    name: Annotated[str, NOT_FINGERPRINTED]
    root: Annotated[str, NOT_FINGERPRINTED] = "runs"
    seed: int = 0
    model: TransformerConfig | VisionTransformerConfig
    task: CausalLM | Classification = field(default_factory=CausalLM)
    data: TokenData | Mixture | ImageData
    precision: Precision = Precision()
    mesh: Annotated[MeshConfig, NOT_FINGERPRINTED] = MeshConfig()
    rules: Annotated[ShardingRules, NOT_FINGERPRINTED] = ShardingRules()
    pipeline: Annotated[PipelineConfig, NOT_FINGERPRINTED] = PipelineConfig()
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: Annotated[CheckpointConfig, NOT_FINGERPRINTED] = field(default_factory=CheckpointConfig)
    track: Annotated[TrackConfig, NOT_FINGERPRINTED] = field(default_factory=TrackConfig)

    @property
    def parts(self) -> Parts:
        """What must go together."""
        return Parts(self.model, self.task, self.data)

    def _shards(self, axes: Sequence[str]) -> int:
        return math.prod(getattr(self.mesh, axis) for axis in axes)

    def _spread(self, axes: Sequence[str]) -> tuple[str, ...]:
        """The fields of those axes that have more than one device."""
        return tuple(f"mesh.{axis}" for axis in axes if getattr(self.mesh, axis) > 1)

    def _batch_parts(self) -> int:
        """Into how many parts a global batch is cut, over devices and over microbatches."""
        return self._shards(self.rules.batch) * self.train.accumulate

    def problems(self) -> Iterable[Problem]:
        """What only shows where two parts meet. Mesh axes of -1 are left out: resolve them first."""
        if self.name in ("", ".", "..") or "/" in self.name:
            yield Problem(fields=("name",), message="must be a folder's name, without a slash", fix="use name=my-run")
        if "://" in self.root:
            yield Problem(fields=("root",), message="must be a local folder", fix="use root=runs")
        yield from schedule_problems(self.optim.schedule, self.train.steps, path="optim.schedule.")
        model, task, data = self.parts
        if len({part.modality for part in self.parts}) > 1:
            yield Problem(
                fields=("model", "task", "data"),
                message=f"read {model.modality}s, {task.modality}s and {data.modality}s, but must read the same",
                fix="name a model, a task and data of one kind",
            )
            return
        yield from model.problems_with(data)
        yield from task.problems_with(data)
        if -1 not in self.mesh.sizes:
            yield from self._divisions()

    def _divisions(self) -> Iterable[Problem]:
        """Every sharded dimension divides over its mesh axes, and the axes of replicas and of context have a use."""
        model, task, data = self.parts
        if self.mesh.replica > 1 and "replica" not in (*self.rules.batch, *self.rules.sequence):
            yield Problem(
                fields=("mesh.replica", "rules.batch"),
                message="replicas would all do the same work",
                fix=f"use rules.batch=(replica,{','.join(self.rules.batch)})",
            )
        if any(axis == "positions" for _, axis in data.sharded_dims.values()):
            if self.mesh.context > 1 and "context" not in self.rules.sequence:
                yield Problem(
                    fields=("mesh.context", "rules.sequence"),
                    message="the context axis spreads sequences and nothing else",
                    fix="use rules.sequence=(context,)",
                )
        elif self._shards(self.rules.sequence) > 1 or self.mesh.context > 1:
            yield Problem(
                fields=("rules.sequence", *self._spread(self.rules.sequence)),
                message=f"{data.modality}s are no sequences, and stay whole",
                fix="use rules.sequence=(context,) mesh.context=1",
            )
        parts = self._batch_parts()
        if self.train.global_batch % parts:
            accumulated = ("train.accumulate",) if self.train.accumulate > 1 else ()
            yield Problem(
                fields=("train.global_batch", *accumulated, *self._spread(self.rules.batch)),
                message=f"the batch does not divide into {parts} equal parts",
                fix=f"use train.global_batch={_rounded_up(self.train.global_batch, parts)}",
            )
        for part, sharded_dims in (("model", model.sharded_dims), ("data", data.sharded_dims)):
            for name, (size, axis) in sharded_dims.items():
                axes = self.rules.mesh_axes(axis)
                if size % self._shards(axes):
                    yield self._division_problem(f"{part}.{name}", size, axes)
                elif axis == "positions":
                    yield from self._blocks(f"{part}.{name}", size)
        # Into how many parts the positions of a sequence are cut for head and loss.
        staged = self.mesh.stage > 1 and self.loss_sharded_dim() == 1
        shards, length = self._shards(self.rules.sequence) * (self.mesh.stage if staged else 1), model.positions(data)
        if shards > 1 and length % shards == 0:
            yield from task.problems_of_shard(length // shards)
        if self.mesh.stage > 1:
            yield from self._stages()

    def _blocks(self, path: str, length: int) -> Iterable[Problem]:
        """Every shard of a sequence has an early and a late block (see `parallel.context`)."""
        shards = self._shards(self.rules.sequence)
        if shards > 1 and self.task.by_position and length % (2 * shards):
            fitting = math.lcm(2 * shards, self._shards(self.rules.mesh_axes("positions")))
            yield Problem(
                fields=(path, *self._spread(self.rules.sequence)),
                message=f"{shards} shards have two blocks each, and {2 * shards} do not divide {length} positions",
                fix=f"use {path}={_rounded_up(length, fitting)}",
            )

    def _stages(self) -> Iterable[Problem]:
        """Every stage has layers, and head and loss can be spread over the stages."""
        places = self.mesh.stage * self.pipeline.chunks
        if self.model.layers < places:
            yield Problem(
                fields=("model.layers", "mesh.stage", "pipeline.chunks"),
                message=f"{places} places for layers",
                fix=f"use model.layers={places} or fewer stages",
            )
        if self.pipeline.schedule == "interleaved" and self.train.accumulate % self.mesh.stage:
            yield Problem(
                fields=("train.accumulate", "mesh.stage", "pipeline.schedule"),
                message="interleaved microbatches come in rounds, one a stage",
                fix=f"use train.accumulate={_rounded_up(self.train.accumulate, self.mesh.stage)}",
            )
        if self.loss_sharded_dim() is None:
            rows = self._batch_parts() * self.mesh.stage
            yield Problem(
                fields=("train.global_batch", "train.accumulate", "mesh.stage"),
                message="stages cannot share the rows of a microbatch, nor its positions, for head and loss",
                fix=f"use train.global_batch={_rounded_up(self.train.global_batch, rows)}",
            )

    def loss_sharded_dim(self) -> int | None:
        """The dimension of the stream by which pipeline stages share head and loss: rows, else positions."""
        if self.train.global_batch % (self._batch_parts() * self.mesh.stage) == 0:
            return 0
        shards = self._shards(self.rules.sequence) * self.mesh.stage
        model, task, data = self.parts
        return 1 if task.by_position and model.positions(data) % shards == 0 else None

    def _division_problem(self, path: str, size: int, axes: Sequence[str]) -> Problem:
        shards, spread = self._shards(axes), self._spread(axes)
        fix = f"{path}={_rounded_up(size, shards)}"
        if len(spread) == 1:
            fix = self._smaller(spread[0].removeprefix("mesh."), math.gcd(size, shards))
        message = f"{shards} shards do not divide {size} {path.removesuffix('.count').split('.')[-1]}"
        return Problem(fields=(path, *spread), message=message, fix=f"use {fix}")

    def _smaller(self, axis: str, size: int) -> str:
        """Overrides that shrink a mesh axis and give its devices to data parallelism, the batch rounded up to fit."""
        spare = getattr(self.mesh, axis) // size
        into = "fsdp" if axis != "fsdp" and self.model.width % (self.mesh.fsdp * spare) == 0 else "replica"
        parts = self._batch_parts() * (1 if axis in self.rules.batch else spare)
        overrides = [f"mesh.{axis}={size}", f"mesh.{into}={getattr(self.mesh, into) * spare}"]
        if self.train.global_batch % parts:
            overrides.append(f"train.global_batch={_rounded_up(self.train.global_batch, parts)}")
        return " ".join(overrides)


def _rounded_up(size: int, parts: int) -> int:
    return -(-size // parts) * parts


def named(loaded: Loaded[Run], file: Run) -> Loaded[Run]:
    """The run with a name of its own where the command line changes the numbers of the config file.

    `python -m launch CONFIG` and `python -m launch CONFIG optim.peak_lr=1e-3` are different runs: the second gets
    the first's name with a fingerprint of the config behind it, unless the command line names it. `file` is the config
    without the overrides of the command line.
    """
    digest = fingerprint(loaded.run)
    if digest == fingerprint(file) or loaded.origins["name"] == COMMAND_LINE:
        return loaded
    name = f"{loaded.run.name}-{digest[:6]}"
    return replace(loaded, run=replace(loaded.run, name=name), origins={**loaded.origins, "name": COMMAND_LINE})


def of_text(run: Run) -> tuple[TransformerConfig, TokenData | Mixture]:
    """The model and the data of a run, for what works on text alone; a ConfigError where they are of something else."""
    model, data = run.model, run.data
    if isinstance(model, TransformerConfig) and isinstance(data, TokenData | Mixture):
        return model, data
    raise ConfigError(f"{run.name}: its model reads {model.modality}s, this is for language models; name another run")


def resolved(run: Run, devices: int) -> Run:
    """The run with its mesh sized for so many devices; a ConfigError where it does not fit."""
    return replace(run, mesh=run.mesh.resolve(devices))
