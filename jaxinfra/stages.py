"""How the model of a run is cut into pipeline stages, and its step made of `parallel.pipeline`.

The train state knows nothing of stages: stacked layers are `[layers, ...]` whatever the schedule, so a checkpoint fits
any number of them. A step lays the layers out as `[chunks, layers of a chunk, stages, ...]` before its first tick,
and their gradients back after its last. Where the stages hold consecutive layers of equal number, that moves
nothing; otherwise each weight crosses `stage` once and its gradient once, whatever the number of microbatches.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.models.module import LayeredModule, StageLayers
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Objective
from jaxinfra.parallel.pipeline import LossSharding, Pipeline, StepInputs, without_stage
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.run import Run
from jaxinfra.user_code import user_code

type Batch = Mapping[str, jax.Array]
STACKED = "blocks"
"""The parameters that are stacked over layers and spread over stages."""


def layer_numbers(layers: int, stages: int, chunks: int) -> np.ndarray:
    """Which layers each chunk of each stage has: `[chunks, layers of a chunk, stages]`, -1 for none.

    Chunks stand in the order of the model: chunk c of stage s at place `c * stages + s`. Where places do not divide
    the layers, the first ones have one more than the others.
    """
    parts = np.array_split(np.arange(layers), stages * chunks)
    longest = len(parts[0])
    numbers = [np.pad(part, (0, longest - len(part)), constant_values=-1) for part in parts]
    return np.reshape(numbers, (chunks, stages, longest)).transpose(0, 2, 1)


class LastStage:
    """The model as an objective calls it on the activations that leave the last stage: `objective.Apply`."""

    def __init__(self, module: LayeredModule, x: jax.Array, objective: Objective):
        self._module, self._x, self._objective = module, x, type(objective)
        self.params = WholeParams(self._refusal)
        self.partial_sums = bool(vars(self._objective).get("partial_sums", False))
        self._called = False

    def __call__(self, params: Any, batch: Batch, *, train: bool = True) -> Any:
        """Returns what the model makes of the microbatch."""
        if self._called or params is not self.params:
            raise self._refusal()
        self._called = True
        return self._module.output(self._x)

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"objective={self._objective.__name__}: needs two forward passes, or parameters besides them, where "
            "pipeline stages make one pass; use mesh.stage=1"
        )


class WholeParams:
    """Stands for the parameters of all stages, which no stage has: an objective can pass it on, and nothing else."""

    def __init__(self, refusal: Callable[[], ConfigError]):
        self._refusal = refusal

    def __getitem__(self, name: str) -> Any:
        raise self._refusal()


class Stages:
    """The stages of a run: a `pipeline.PipelineModel`, and the step that it makes."""

    def __init__(self, run: Run, partitioner: Partitioner, specs: Any, stored: Any):
        """Builds the model twice: for the rows of all stages, and for its end, spread over them.

        The partitioner is that of a run without stages; `specs` and `stored` are those of every parameter.
        """
        self.run, self.partitioner, self.specs, self.stored = run, partitioner, specs, stored
        rules, self.stages, self.chunks = partitioner.rules, partitioner.mesh.stage, run.pipeline.chunks
        dim = run.mesh_fit.loss_dim()
        assert dim is not None, "validate the run first"
        spread = {"batch": (*rules.batch, "stage")} if dim == 0 else {"sequence": (*rules.sequence, "stage")}
        self.at_end = replace(partitioner, rules=replace(rules, block_sequence=(), **spread))
        in_rows = replace(partitioner, rules=replace(rules, batch=("stage", *rules.batch)))
        module = run.model.build(in_rows)
        if not isinstance(module, LayeredModule):
            raise ConfigError(
                f"mesh.stage={self.stages}: {type(run.model).__name__} builds no LayeredModule, whose layers pipeline "
                "stages could share; use mesh.stage=1"
            )
        self._rows, self._end = (nnx.split(one)[0] for one in (module, run.model.build(self.at_end)))
        numbers = layer_numbers(run.model.pipeline_layers, self.stages, self.chunks)
        self.places, self.longest = self.stages * self.chunks, numbers.shape[1]
        # So many places have that many layers, all others one less.
        self.full = run.model.pipeline_layers - self.places * (self.longest - 1)
        self._uniform = module.uniform(numbers)
        schedule = run.pipeline.make_schedule(self.stages, run.train.accumulate)
        where = LossSharding(dim=dim, spec=self.at_end.spec("batch", "sequence", None))
        self.pipeline = Pipeline(self, schedule, where, numbers)

    # The model, as the pipeline calls it

    def _merged(self, graphdef: Any, params: dict[str, Any]) -> Any:
        return nnx.merge(graphdef, nnx.State({**self.specs, **params}))

    def embed(self, shared: Any, rows: Batch) -> jax.Array:
        """See `pipeline.PipelineModel`."""
        return self._merged(self._rows, shared).embed(rows)

    def apply_layers(self, weights: Any, x: jax.Array, rows: Batch, numbers: jax.Array) -> tuple[jax.Array, Any]:
        """See `pipeline.PipelineModel`."""
        model = self._merged(self._rows, {STACKED: weights})
        return model.apply_layers(x, rows, StageLayers(numbers, self._uniform))

    def loss(self, shared: Any, x: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `pipeline.PipelineModel`."""
        fields = self.run.data.batch_spec(validation=True)
        batch = {
            name: jax.reshard(batch[name], self.at_end.spec("batch", *spec.axes))
            for name, spec in fields.items()
            if name in batch
        }
        objective = self.run.objective
        forward = LastStage(self._merged(self._end, shared), x, objective)
        with user_code(type(objective), "objective"):
            return losses.checked(objective, objective.loss(forward, forward.params, batch))

    def aux_loss(self, stats: Any) -> jax.Array | None:
        """See `pipeline.PipelineModel`."""
        return self._merged(self._rows, {}).aux_loss(stats)

    # A step

    def gradients(self, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array], dict[str, jax.Array]]:
        """Gradients of the summed loss, as parameters are stored, sums and statistics; `batch` is in microbatches."""
        weights, shared, sums, stats = self.pipeline.gradients(StepInputs(*self._laid_out(params), batch))
        shared = jax.tree.map(self._scattered, shared, self._of_shared(self.stored))
        return {**shared, STACKED: self._laid_back(weights)}, *self._whole(sums, stats)

    def evaluate(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """All sums; `batch` is in microbatches."""
        return self._whole(*self.pipeline.evaluate(StepInputs(*self._laid_out(params), batch)))[0]

    def _whole(
        self, sums: dict[str, jax.Array], stats: dict[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        whole = {name: jax.reshard(a, PartitionSpec()) for name, a in sums.items()}
        return whole, {name: self._joined(jax.reshard(a, PartitionSpec())) for name, a in stats.items()}

    @staticmethod
    def _of_shared(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in tree.items() if name != STACKED}

    def _laid_out(self, params: Any) -> tuple[Any, Any]:
        """Weights of the layers by stage, and all others whole on every stage; gradients of both stay partial sums."""
        shared = jax.tree.map(
            lambda p, s: jax.reshard(p, self.partitioner.with_reduced(_of_any_stage(s), "stage")),
            self._of_shared(params),
            self._of_shared(self.stored),
        )
        weights = jax.tree.map(
            lambda p, s: jax.reshard(self._split(p), self.partitioner.with_reduced(self._staged(s))),
            params[STACKED],
            self.stored[STACKED],
        )
        return weights, shared

    def _scattered(self, grad: jax.Array, stored: PartitionSpec) -> jax.Array:
        """A partial sum over `replica` and `stage` as it is stored: over `stage` first, so that a part crosses."""
        axes = jax.typeof(grad).sharding.spec.unreduced - {"stage"}
        return jax.reshard(jax.reshard(grad, stored.update(unreduced=axes)), stored)

    def _laid_back(self, grads: Any) -> Any:
        def back(g: jax.Array, stored: PartitionSpec) -> jax.Array:
            # Stacked layers can be joined as they are stored, wherever `stage` is there.
            return jax.reshard(self._joined(jax.reshard(g, PartitionSpec(None, None, *stored.partitions))), stored)

        return jax.tree.map(back, grads, self.stored[STACKED])

    def _staged(self, stored: PartitionSpec) -> PartitionSpec:
        """The sharding by stage of a stacked parameter that is stored like this."""
        return PartitionSpec(None, None, "stage", *_of_any_stage(stored).partitions[1:])

    def _split(self, stacked: jax.Array) -> jax.Array:
        """`[layers, ...]` to `[chunks, layers of a chunk, stages, ...]`, zeros for none."""
        places, longest, full, rest = self.places, self.longest, self.full, stacked.shape[1:]
        spec = jax.typeof(stacked).sharding.spec.partitions
        if full < places:
            head = stacked[: full * longest].reshape(full, longest, *rest, out_sharding=_places(spec))
            tail = stacked[full * longest :].reshape(places - full, longest - 1, *rest, out_sharding=_places(spec))
            tail = jnp.pad(tail, [(0, 0), (0, 1), *[(0, 0)] * len(rest)])
            stacked = jnp.concatenate([head, tail])
        shape = (self.chunks, self.stages, longest, *rest)
        out = PartitionSpec(None, spec[0], None, *spec[1:])
        return jnp.moveaxis(stacked.reshape(shape, out_sharding=out), 1, 2)

    def _joined(self, laid: jax.Array) -> jax.Array:
        """The inverse of `_split`."""
        places, longest, full, rest = self.places, self.longest, self.full, laid.shape[3:]
        layers, spec = self.run.model.pipeline_layers, jax.typeof(laid).sharding.spec.partitions
        laid = jnp.moveaxis(laid, 2, 1)
        if full == places:
            return laid.reshape(layers, *rest, out_sharding=PartitionSpec(spec[2], *spec[3:]))
        laid = laid.reshape(places, longest, *rest, out_sharding=PartitionSpec(None, None, *spec[3:]))
        flat = PartitionSpec(None, *spec[3:])
        head = laid[:full].reshape(full * longest, *rest, out_sharding=flat)
        tail = laid[full:, : longest - 1].reshape(layers - full * longest, *rest, out_sharding=flat)
        return jnp.concatenate([head, tail])


def _places(spec: tuple[Any, ...]) -> PartitionSpec:
    assert spec[0] is None, spec
    return PartitionSpec(None, None, *spec[1:])


def _of_any_stage(spec: PartitionSpec) -> PartitionSpec:
    """The sharding that is left when `stage` is taken from it."""
    return PartitionSpec(*(without_stage(part) or None for part in spec.partitions))
