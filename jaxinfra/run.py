"""`Run`: everything that a training run is, in one typed config."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Annotated, Literal

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.compiler import OptionSet
from jaxinfra.config import NOT_FINGERPRINTED, Loaded, Problem, fingerprint
from jaxinfra.config.limits import PositiveInt
from jaxinfra.config.source import COMMAND_LINE
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.models.model import ModelConfig
from jaxinfra.objectives.objective import Objective
from jaxinfra.optim.config import OptimConfig
from jaxinfra.parallel.divisibility import MeshFit
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize, ShardingRules
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.track.tracker import TrackConfig
from jaxinfra.user_code import user_code


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and in what batches.

    Attributes:
        steps: updates of the parameters, over the whole run.
        global_batch: samples (sequences, images) of one step, over all devices.
        accumulate: microbatches that a step is computed in, one at a time.
        eval_every: steps between evaluations; there is one at the end as well. None: only that one.
        eval_samples: validation samples to evaluate on; None is all.
        compiler: a set of options for the compiler of the steps (see `jaxinfra.compiler`).
    """

    steps: PositiveInt = 1000
    global_batch: PositiveInt = 32
    accumulate: Annotated[PositiveInt, NOT_FINGERPRINTED] = 1
    eval_every: Annotated[PositiveInt | None, NOT_FINGERPRINTED] = 100
    eval_samples: PositiveInt | None = None
    compiler: Annotated[OptionSet, NOT_FINGERPRINTED] = "default"

    def evaluates_after(self, completed_steps: int) -> bool:
        """Whether there is an evaluation after so many steps."""
        at_interval = self.eval_every is not None and completed_steps % self.eval_every == 0
        return at_interval or completed_steps == self.steps


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


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a training run is.

    Fields marked `NOT_FINGERPRINTED`, here and below, change where and how fast a run goes, or in what order it rounds,
    but not the numbers it computes. Stores and the run that it starts from are known by their fingerprints, not by
    their paths.

    Attributes:
        name: name of its directory.
        root: folder of run directories.
        seed: of the first parameters, and of dropout.
        model: the network.
        objective: what it minimizes.
        data: what it is trained on.
        init: directory of the run whose parameters it starts from, such as runs/base, or runs/base@500 for those after
            500 steps; None draws them.
        precision: number formats.
        mesh: how the devices are arranged.
        rules: which mesh axes shard which arrays.
        pipeline: how microbatches pass the stages, where mesh.stage is above 1.
        optim: how parameters are updated.
        train: how long, in what batches.
        checkpoint: when the state is saved.
        track: where metrics go.
    """

    name: Annotated[str, NOT_FINGERPRINTED]
    root: Annotated[str, NOT_FINGERPRINTED] = "runs"
    seed: int = 0
    model: ModelConfig
    objective: Objective = field(default_factory=Objective.default)
    data: DataConfig
    init: Annotated[str | None, NOT_FINGERPRINTED] = None
    precision: Precision = Precision()
    mesh: Annotated[MeshConfig, NOT_FINGERPRINTED] = MeshConfig()
    rules: Annotated[ShardingRules, NOT_FINGERPRINTED] = ShardingRules()
    pipeline: Annotated[PipelineConfig, NOT_FINGERPRINTED] = PipelineConfig()
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: Annotated[CheckpointConfig, NOT_FINGERPRINTED] = field(default_factory=CheckpointConfig)
    track: Annotated[TrackConfig, NOT_FINGERPRINTED] = field(default_factory=TrackConfig)

    @property
    def mesh_fit(self) -> MeshFit:
        """The run as its mesh sees it."""
        dims = {f"model.{name}": dim for name, dim in self.model.sharded_dims.items()}
        if self.model.supports_context:
            dims |= {f"data.{name}": dim for name, dim in self.data.sharded_dims.items()}
        return MeshFit(
            mesh=self.mesh,
            rules=self.rules,
            pipeline=self.pipeline,
            global_batch=self.train.global_batch,
            accumulate=self.train.accumulate,
            sharded_dims=dims,
            positions=self.model.positions(self.data),
            by_position=self.objective.by_position,
            pipeline_layers=self.model.pipeline_layers,
            modality=self.data.modality,
        )

    def problems(self) -> Iterable[Problem]:
        """Yields what only shows where two parts meet. A mesh axis of -1 leaves out what depends on the mesh."""
        if self.name in ("", ".", "..") or "/" in self.name:
            yield Problem(fields=("name",), message="must be a folder's name, without a slash", fix="use name=my-run")
        if "://" in self.root:
            yield Problem(fields=("root",), message="must be a local folder", fix="use root=runs")
        yield from self.optim.schedule.problems_in_run(self.train.steps, "optim.schedule.")
        model, objective, data = self.model, self.objective, self.data
        if model.modality not in (None, data.modality):
            yield Problem(
                fields=("model", "data"),
                message=f"the model reads {model.modality}s, the data has {data.modality}s",
                fix=f"name a model of {data.modality}s or data of {model.modality}s",
            )
            return
        with user_code(type(data), "data"):
            arrays = data.batch_spec(validation=False)
        if missing := [name for name in objective.batch_fields if name not in arrays]:
            yield Problem(
                fields=("objective", "data"),
                message=f"the objective needs {' and '.join(missing)}, a batch of the data has {', '.join(arrays)}",
                fix="name an objective and data that go together",
            )
            return
        with user_code(type(model), "model"), user_code(type(data), "data"):
            found = [*model.problems_with(data), *objective.problems_with(data)]
        yield from found
        if -1 in self.mesh.sizes:
            return
        fit = self.mesh_fit
        yield from fit.problems()
        if (positions := fit.loss_positions()) is not None:
            yield from objective.problems_of_shard(positions)
        if objective.uses_reference and self.init is None:
            yield Problem(
                fields=("init", "objective"),
                message="the objective's reference is the run that this one starts from",
                fix="use init=runs/NAME, a run with the same model",
            )
        if objective.uses_reference and self.mesh.stage > 1:
            yield Problem(
                fields=("objective", "mesh.stage"),
                message="the objective needs two forward passes, pipeline stages make one",
                fix="use mesh.stage=1",
            )


def with_fingerprint_name(loaded: Loaded[Run], file: Run) -> Loaded[Run]:
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


def with_mesh_size(run: Run, devices: int) -> Run:
    """The run with its mesh sized for so many devices; a ConfigError where it does not fit."""
    return replace(run, mesh=run.mesh.resolve(devices))
