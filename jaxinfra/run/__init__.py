"""`Run`: the config of a training run. Each part is defined in the package that it configures, or else in this one."""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from annotated_types import Ge, Lt

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.config import NOT_FINGERPRINTED, Loaded, Problem, fingerprint, validate
from jaxinfra.config.source import COMMAND_LINE
from jaxinfra.data.interfaces import DataConfig
from jaxinfra.errors import ConfigError
from jaxinfra.machine.config import ProfileConfig
from jaxinfra.models.adapter import Lora
from jaxinfra.models.model import ModelConfig
from jaxinfra.objectives.objective import Objective
from jaxinfra.optim.config import OptimConfig
from jaxinfra.parallel.divisibility import MeshFit
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import ShardingRules
from jaxinfra.parallel.schedules import PipelineConfig
from jaxinfra.processes.config import WatchdogConfig
from jaxinfra.run.guard import GuardConfig
from jaxinfra.run.precision import Precision
from jaxinfra.run.train import TrainConfig
from jaxinfra.track.config import TrackConfig
from jaxinfra.user_code import user_code_errors

_log = logging.getLogger(__name__)
__all__ = ["GuardConfig", "Precision", "Run", "TrainConfig", "with_fingerprint_name", "with_mesh_size"]


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
        adapter: small matrices that are trained beside the model, whose parameters are frozen then; None trains them.
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
    adapter: Lora | None = None
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
    def width_ratio(self) -> float:
        """The model's width over the base width of muP; 1 without muP."""
        base = self.optim.base_width if self.optim.parametrization == "mup" else None
        return 1.0 if base is None else getattr(self.model, "hidden_size", base) / base

    @property
    def mtp_depths(self) -> int:
        """Number of modules for multi-token prediction that are trained."""
        return self.model.mtp_depths if self.adapter is None and self.objective.trains_mtp else 0

    @property
    def mesh_fit(self) -> MeshFit:
        """The sizes that must be divisible by mesh axes."""
        dims = {f"model.{name}": dim for name, dim in self.model.sharded_dims.items()}
        if self.model.supports_context:  # else sequences are not sharded
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
            pipeline_periods=self.model.pipeline_periods,
            modality=self.data.modality,
        )

    def further_overrides(self, overrides: Sequence[str]) -> Iterable[str]:
        """Yields an override for a warmup of the config file that is longer than `train.steps` of the overrides.

        So `train.steps=5` is enough to try a config. It logs a warning.
        """
        steps = dict(each.split("=", 1) for each in overrides if "=" in each).get("train.steps", "")
        schedule, is_set = self.optim.schedule, any(each.startswith("optim.schedule") for each in overrides)
        if not is_set and steps.isdecimal() and any(schedule.problems_in_run(int(steps), "")):
            override, warmup = f"optim.schedule.warmup_steps={int(steps) // 10}", schedule.warmup_steps
            _log.warning("warmup of %d steps does not fit into train.steps=%s; using %s", warmup, steps, override)
            yield override

    def problems(self) -> Iterable[Problem]:
        """Yields conflicts between parts of the config; with a mesh axis of -1, checks of the mesh are left out."""
        if self.name in ("", ".", "..") or "/" in self.name or not self.name.isprintable() or len(self.name) > 200:
            message = "must be a folder's name, without a slash or control characters, of up to 200 characters"
            yield Problem(fields=("name",), message=message, fix="use name=my-run")
        if not (self.root.isprintable() and (self.init or "").isprintable()):
            yield Problem(fields=("root", "init"), message="have control characters", fix="use root=runs")
        if "://" in self.root and not re.match("(s3|gs)://[^/]", self.root):
            message = "must be a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"
            yield Problem(fields=("root",), message=message, fix="use root=runs")
        yield from self.optim.schedule.problems_in_run(self.train.steps, "optim.schedule.")
        yield from self.profile.problems_in_run(self.train.steps, "profile.")
        yield from self._canonical_problems()
        lacks = self.optim.base_width is None or not hasattr(self.model, "hidden_size")
        if self.optim.parametrization == "mup" and (self.adapter is not None or (self.init or "").startswith("hf:")):
            message, fix = "published weights were not trained with muP", "use optim.parametrization=standard"
            yield Problem(fields=("optim.parametrization", "init"), message=message, fix=fix)
        elif self.optim.parametrization == "mup" and lacks:
            message = "muP needs a base width, and a model with a field hidden_size"
            fix = "use optim.base_width=128, or optim.parametrization=standard"
            yield Problem(fields=("optim.parametrization", "model"), message=message, fix=fix)
        model, objective, data = self.model, self.objective, self.data
        if model.modality not in (None, data.modality):
            message = f"the model reads {model.modality}s, the data has {data.modality}s"
            fix = f"name a model of {data.modality}s or data of {model.modality}s"
            yield Problem(fields=("model", "data"), message=message, fix=fix)
            return  # the checks below rely on a model, an objective and data that go together
        with user_code_errors(type(data), "data"):
            arrays = data.batch_spec(validation=False)
        if missing := [name for name in objective.batch_fields if name not in arrays]:
            message = f"the objective needs {' and '.join(missing)}, a batch of the data has {', '.join(arrays)}"
            fix = "name an objective and data that go together"
            yield Problem(fields=("objective", "data"), message=message, fix=fix)
            return
        with user_code_errors(type(model), "model"), user_code_errors(type(data), "data"):
            conflicts = [*model.problems_with(data), *objective.problems_with(data)]
        yield from conflicts
        if -1 in self.mesh.sizes:  # `with_mesh_size` replaces it once the number of devices is known
            return
        fit = self.mesh_fit
        yield from fit.problems()
        if self.mesh.stage > 1:
            yield from model.problems_of_stages(self.mesh.stage * self.pipeline.chunks)
        if (positions := fit.loss_positions()) is not None:
            yield from objective.problems_of_shard(positions)
        if self.init is None and self.adapter is not None:
            message, fix = "an adapter needs the weights of a run or model", "use init=hf:ORG/NAME or init=runs/NAME"
            yield Problem(fields=("init", "adapter"), message=message, fix=fix)
        if self.checkpoint.init_key is not None and not (self.init or "").startswith("hf:"):
            message, fix = "only published weights are signed", "use init=hf:DIR, or checkpoint.init_key=none"
            yield Problem(fields=("checkpoint.init_key", "init"), message=message, fix=fix)
        if self.adapter is None and self.precision.frozen is not None:
            message, fix = "only weights beside an adapter have another format", "use adapter=lora"
            yield Problem(fields=("precision.frozen", "adapter"), message=message, fix=fix)
        if objective.uses_reference and self.init is None:
            message = "the objective's reference is the run that this one starts from"
            fix = "use init=runs/NAME, a run with the same model"
            yield Problem(fields=("init", "objective"), message=message, fix=fix)
        if getattr(data, "cached_reference", False) and not objective.reference_fields:
            message, fix = "the objective has no reference", "use data.cached_reference=false"
            yield Problem(fields=("data.cached_reference", "objective"), message=message, fix=fix)
        if (objective.uses_reference or objective.makes_rows) and self.mesh.stage > 1:
            message = "the objective needs two forward passes or other rows, but pipeline stages make one of the batch"
            yield Problem(fields=("objective", "mesh.stage"), message=message, fix="use mesh.stage=1")

    def _canonical_problems(self) -> Iterable[Problem]:
        """Yields what cannot have the same bits on every mesh, or needs them but has no other devices."""
        devices = math.prod(self.mesh.sizes)
        if (count := self.train.canonical) is None:
            if self.guard.replay_every is not None:
                message = "other devices compute a step with the same bits only in canonical mode"
                fix = "use train.canonical=8, or guard.replay_every=none"
                yield Problem(fields=("guard.replay_every", "train.canonical"), message=message, fix=fix)
            return
        # Read from the class itself: a subclass of an elementwise optimizer may add up elements.
        if not vars(type(self.optim.optimizer)).get("elementwise", False):
            message = "its update adds up elements that the mesh spreads over devices"
            fix = "use optim.optimizer=adamw, lion or sgd"
            yield Problem(fields=("optim.optimizer", "train.canonical"), message=message, fix=fix)
        if self.optim.offload:
            message = "an offloaded state is updated in a loop, whose products are rounded as the compiler likes"
            yield Problem(fields=("optim.offload", "train.canonical"), message=message, fix="use optim.offload=false")
        if self.optim.state_dtype == "8bit":
            message, fix = (
                "its blocks share scales, which the mesh spreads over devices",
                "use optim.state_dtype=float32",
            )
            yield Problem(fields=("optim.state_dtype", "train.canonical"), message=message, fix=fix)
        axes = asdict(self.mesh)
        if -1 not in self.mesh.sizes and count % devices:
            # `n & -n` is the largest power of two that divides n, and `n & (n - 1)` is 0 for a power of two.
            smaller = [f"mesh.{axis}={size & -size}" for axis, size in axes.items() if size & (size - 1)]
            fields = (*(f"mesh.{axis}" for axis, size in axes.items() if size > 1), "train.canonical")
            message = f"{devices} devices cannot share {count} virtual shards evenly"
            fix = f"use {' '.join(smaller or [f'train.canonical={devices}'])}"
            yield Problem(fields=fields, message=message, fix=fix)


def with_fingerprint_name(loaded: Loaded[Run], file: Run) -> Loaded[Run]:
    """Appends the fingerprint to the run's name if overrides on the command line change the fingerprint.

    So `python -m launch CONFIG` and `python -m launch CONFIG optim.peak_lr=1e-3` have different directories. A name
    given on the command line is kept. `file` is the config without the overrides. `name` has an origin in any case,
    because it has no default.
    """
    digest = fingerprint(loaded.run)
    if digest == fingerprint(file) or loaded.origins["name"] == COMMAND_LINE:
        return loaded
    name = f"{loaded.run.name}-{digest[:6]}"  # the first 6 of 16 digits
    return replace(loaded, run=replace(loaded.run, name=name), origins={**loaded.origins, "name": COMMAND_LINE})


def with_mesh_size(run: Run, devices: int) -> Run:
    """Sets the mesh axis that is -1 to use all devices.

    Raises ConfigError if the mesh does not fit their number, with what else is wrong with the meshes that it suggests.
    """
    try:
        return replace(run, mesh=run.mesh.resolve(devices))
    except ConfigError as error:
        if -1 in run.mesh.sizes:
            raise
        others = math.prod(run.mesh.sizes) // run.mesh.fsdp
        suggested = [run.mesh.fsdp, *([devices // others] if devices % others == 0 else [])]
        objections = [str(error)]
        for size in suggested:
            try:
                validate(replace(run, mesh=replace(run.mesh, fsdp=size)))
            except ConfigError as other:
                objections.append(str(other))
        raise ConfigError("; ".join(dict.fromkeys(objections))) from error
