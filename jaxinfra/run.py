"""`Run`: the config of a training run."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.compiler import OptionSet
from jaxinfra.config import NOT_FINGERPRINTED, Loaded, Problem, fingerprint
from jaxinfra.config.limits import NonNegativeInt, PositiveFloat, PositiveInt
from jaxinfra.config.source import COMMAND_LINE
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.models.model import ModelConfig
from jaxinfra.objectives.objective import Objective
from jaxinfra.optim.config import OptimConfig
from jaxinfra.packages import install_command
from jaxinfra.parallel.divisibility import MeshFit
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import Quantize, ShardingRules
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.runtime.profile_config import ProfileConfig
from jaxinfra.runtime.watchdog_config import WatchdogConfig
from jaxinfra.track.config import TrackConfig
from jaxinfra.user_code import user_code_errors


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and in what batches.

    Attributes:
        steps: number of updates of the parameters.
        global_batch: samples (sequences, images) per step, over all devices.
        accumulate: number of microbatches per step (gradient accumulation).
        canonical: number of virtual shards of a batch, a power of two. Losses and parameters are then the same bits on
            every mesh of up to this number of devices, at a price in memory (see docs/parallelism.md). None is faster.
        eval_every: steps between evaluations. The last step is always followed by one; None evaluates only there.
        eval_samples: number of validation samples to evaluate on; None takes all.
        eval_tasks: tasks of lm-eval to run at each evaluation of a language model: names, or YAML files. Their metrics
            are eval/TASK/METRIC.
        compiler: name of a set of compiler options (see `jaxinfra.compiler`).
        skip_batches: ranges of batches that no step reads, such as ((120, 140),) for the batches 120 to 139 of the
            order of the data, counted from 0. A run that goes back after bad numbers records here what it leaves out
            (see `GuardConfig`), so that a replay leaves out the same.
        compile_cache: folder or URL that keeps compiled programs for the next start. "auto" is a folder in the user's
            cache folder, or JAX_COMPILATION_CACHE_DIR; None compiles at every start.
    """

    steps: Annotated[int, Ge(1), Lt(2**31)] = 1000
    global_batch: PositiveInt = 32
    accumulate: Annotated[PositiveInt, NOT_FINGERPRINTED] = 1
    canonical: Annotated[int, Ge(2)] | None = None
    eval_every: Annotated[PositiveInt | None, NOT_FINGERPRINTED] = 100
    eval_samples: PositiveInt | None = None
    eval_tasks: Annotated[tuple[str, ...], NOT_FINGERPRINTED] = ()
    skip_batches: tuple[tuple[int, int], ...] = ()
    compiler: Annotated[OptionSet, NOT_FINGERPRINTED] = "default"
    compile_cache: Annotated[str | None, NOT_FINGERPRINTED] = "auto"

    def evaluates_after(self, completed_steps: int) -> bool:
        """Whether to evaluate after this number of steps."""
        at_interval = self.eval_every is not None and completed_steps % self.eval_every == 0
        return at_interval or completed_steps == self.steps

    def batch_of_step(self, step: int) -> int:
        """Returns which batch of the order of the data a step reads; both are counted from 0."""
        for start, stop in sorted(self.skip_batches):
            if start <= step:
                step += stop - start
        return step

    def problems(self) -> Iterable[Problem]:
        """Yields ranges of `skip_batches` that overlap, and conflicts with the virtual shards of `canonical`."""
        yield from self._canonical_problems()
        ranges = sorted(self.skip_batches)
        if any(not 0 <= start < stop for start, stop in ranges) or any(
            following[0] < stop for (_, stop), following in pairwise(ranges)
        ):
            message = "must be ranges (FIRST, END) of batches, which do not overlap"
            yield Problem(fields=("skip_batches",), message=message, fix="use train.skip_batches=((120, 140),)")

    def _canonical_problems(self) -> Iterable[Problem]:
        """Yields conflicts with the virtual shards."""
        if self.canonical is None:
            return
        if self.canonical & (self.canonical - 1):
            power = 2 ** self.canonical.bit_length()
            message = "must be a power of two, as it is halved until each device has its virtual shards"
            yield Problem(fields=("canonical",), message=message, fix=f"use canonical={power}")
        if self.accumulate > 1:
            yield Problem(
                fields=("canonical", "accumulate"),
                message="virtual shards take the place of microbatches: each device computes its own one by one",
                fix=f"use accumulate=1 canonical={self.canonical * self.accumulate}",
            )
        if self.global_batch % self.canonical:
            yield Problem(
                fields=("global_batch", "canonical"),
                message="each virtual shard has as many samples",
                fix=f"use global_batch={-(-self.global_batch // self.canonical) * self.canonical}",
            )


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Sets the reaction of a run to numbers that go wrong.

    With `skip_nonfinite`, a step whose loss or gradient is NaN or infinite changes nothing but the number of steps.
    After `max_nonfinite` such steps in a row, or after a spike of the loss, the run goes back to its newest checkpoint
    from before, and leaves out the batches since then. If that does not help before the next checkpoint, it ends with
    exit code 80.

    Attributes:
        skip_nonfinite: whether to skip the update of such a step. False ends the run at the next logged step. It makes
            the update a branch of the program, which takes 0 to 2 % more cycles on TPUs. Gradients whose shards have
            dimensions below 128 also cross slices with padding then.
        max_nonfinite: number of skipped steps in a row after which the run goes back.
        spike: a loss is a spike if it is this many standard deviations above the median of the last `window` losses.
            The deviation is a robust one, 1.4826 times the median absolute deviation. None looks for no spikes.
        window: number of losses to compare with; before there are so many, no loss is a spike.
        skip_batches: number of batches to leave out after those that led to the spike, too.
        compare_replicas_every: steps between two comparisons of what several devices hold the same copy of, and before
            each save. A difference means that a device computes wrong; the run ends with exit code 83 and names it.
            None compares nothing.
    """

    skip_nonfinite: bool = False
    max_nonfinite: PositiveInt = 10
    spike: PositiveFloat | None = None
    window: Annotated[int, Ge(8), Le(10_000)] = 64
    skip_batches: NonNegativeInt = 0
    compare_replicas_every: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Number formats.

    Attributes:
        params: dtype in which parameters are stored.
        compute: dtype of weights and activations in the model; losses, norms and sums are float32.
        quantize: format of the operands of the layers' matmuls with weights (see `ops.quantized`); embedding and head
            are not quantized.
    """

    params: Literal["float32", "bfloat16"] = "float32"
    compute: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Quantize = "none"

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `quantize` is set without its package."""
        if self.quantize != "none" and find_spec("qwix") is None:
            yield Problem(
                fields=("quantize",),
                message="quantized matmuls need the package qwix, which is not installed",
                fix=f"run {install_command('jaxinfra[quantized]')}",
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """The config of a training run.

    Fields marked `NOT_FINGERPRINTED`, here and in nested configs, change the place, the speed or the order of rounding,
    but not the mathematics of a run. `train.canonical` is not one of them: a run with it is wanted to the last bit.
    Prepared datasets and the run named by `init` have fingerprints of their own, so their paths are not part of the
    fingerprint.

    Attributes:
        name: name of the run's directory.
        root: parent of the run's directory: a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
        seed: seed of initialization and dropout.
        model: the model.
        objective: the loss to minimize.
        data: the training and validation data.
        init: a run to take the initial parameters from: runs/base for its last checkpoint, runs/base@500 for step 500.
            None initializes them at random.
        precision: number formats.
        mesh: sizes of the device mesh.
        rules: which mesh axes shard which arrays.
        pipeline: pipeline schedule, if mesh.stage is above 1.
        optim: optimizer and learning rate.
        train: number of steps, batch size, evaluation.
        guard: what to do when numbers go wrong.
        checkpoint: when to save checkpoints.
        track: where to log metrics.
        profile: which steps to profile.
        watchdog: how long each phase may take before the run counts as hung.
    """

    name: Annotated[str, NOT_FINGERPRINTED]
    root: Annotated[str, NOT_FINGERPRINTED] = "runs"
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
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
    guard: Annotated[GuardConfig, NOT_FINGERPRINTED] = GuardConfig()
    checkpoint: Annotated[CheckpointConfig, NOT_FINGERPRINTED] = field(default_factory=CheckpointConfig)
    track: Annotated[TrackConfig, NOT_FINGERPRINTED] = field(default_factory=TrackConfig)
    profile: Annotated[ProfileConfig, NOT_FINGERPRINTED] = ProfileConfig()
    watchdog: Annotated[WatchdogConfig, NOT_FINGERPRINTED] = WatchdogConfig()

    @property
    def mesh_fit(self) -> MeshFit:
        """The sizes that must be divisible by mesh axes."""
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
        """Yields conflicts between parts of the config; with a mesh axis of -1, checks of the mesh are left out."""
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable() or len(self.name) > 200:
            message = "must be a folder's name, without a slash or control characters, of up to 200 characters"
            yield Problem(fields=("name",), message=message, fix="use name=my-run")
        if not (self.root.isprintable() and (self.init or "").isprintable()):
            yield Problem(fields=("root", "init"), message="have control characters", fix="use root=runs")
        if "://" in self.root and not self.root.startswith(("s3://", "gs://")):
            message = "must be a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
            yield Problem(fields=("root",), message=message, fix="use root=runs")
        yield from self.optim.schedule.problems_in_run(self.train.steps, "optim.schedule.")
        yield from self.profile.problems_in_run(self.train.steps, "profile.")
        yield from self._canonical_problems()
        model, objective, data = self.model, self.objective, self.data
        if model.modality not in (None, data.modality):
            yield Problem(
                fields=("model", "data"),
                message=f"the model reads {model.modality}s, the data has {data.modality}s",
                fix=f"name a model of {data.modality}s or data of {model.modality}s",
            )
            return  # the checks below rely on a model, an objective and data that go together
        with user_code_errors(type(data), "data"):
            arrays = data.batch_spec(validation=False)
        if missing := [name for name in objective.batch_fields if name not in arrays]:
            yield Problem(
                fields=("objective", "data"),
                message=f"the objective needs {' and '.join(missing)}, a batch of the data has {', '.join(arrays)}",
                fix="name an objective and data that go together",
            )
            return
        with user_code_errors(type(model), "model"), user_code_errors(type(data), "data"):
            conflicts = [*model.problems_with(data), *objective.problems_with(data)]
        yield from conflicts
        if -1 in self.mesh.sizes:  # `with_mesh_size` sets it once the number of devices is known
            return
        fit = self.mesh_fit
        yield from fit.problems()
        if self.mesh.stage > 1:
            yield from model.problems_of_stages(self.mesh.stage * self.pipeline.chunks)
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
                message="the objective needs two forward passes, but pipeline stages make one",
                fix="use mesh.stage=1",
            )

    def _canonical_problems(self) -> Iterable[Problem]:
        """Yields what cannot have the same bits on every mesh."""
        if (count := self.train.canonical) is None:
            return
        if not vars(type(self.optim.optimizer)).get("elementwise", False):  # it is not inherited
            yield Problem(
                fields=("optim.optimizer", "train.canonical"),
                message="its update adds up elements that the mesh spreads over devices",
                fix="use optim.optimizer=adamw, lion or sgd",
            )
        if self.optim.offload:
            yield Problem(
                fields=("optim.offload", "train.canonical"),
                message="an offloaded state is updated in a loop, whose products are rounded as the compiler likes",
                fix="use optim.offload=false",
            )
        axes, devices = asdict(self.mesh), math.prod(self.mesh.sizes)
        if -1 not in self.mesh.sizes and count % devices:
            # `n & -n` is the largest power of two that divides n.
            smaller = [f"mesh.{axis}={size & -size}" for axis, size in axes.items() if size & (size - 1)]
            yield Problem(
                fields=(*(f"mesh.{axis}" for axis, size in axes.items() if size > 1), "train.canonical"),
                message=f"{devices} devices cannot share {count} virtual shards evenly",
                fix=f"use {' '.join(smaller or [f'train.canonical={devices}'])}",
            )


def with_fingerprint_name(loaded: Loaded[Run], file: Run) -> Loaded[Run]:
    """Appends the fingerprint to the run's name if overrides on the command line change the fingerprint.

    So `python -m launch CONFIG` and `python -m launch CONFIG optim.peak_lr=1e-3` have different directories. A name
    given on the command line is kept. `file` is the config without the overrides.
    """
    digest = fingerprint(loaded.run)
    if digest == fingerprint(file) or loaded.origins["name"] == COMMAND_LINE:
        return loaded
    name = f"{loaded.run.name}-{digest[:6]}"
    return replace(loaded, run=replace(loaded.run, name=name), origins={**loaded.origins, "name": COMMAND_LINE})


def with_mesh_size(run: Run, devices: int) -> Run:
    """Sets the mesh axis that is -1 to use all devices; ConfigError if the mesh does not fit their number."""
    return replace(run, mesh=run.mesh.resolve(devices))
