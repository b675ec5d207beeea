"""Computes gradients on pipeline stages (`mesh.stage` above 1): splits the model, and runs it by `parallel.pipeline`.

A chunk is a run of consecutive layers (Megatron's model chunk, or virtual stage); a stage holds one or more chunks.

The train state does not depend on stages: stacked layers are `[layers, ...]`, so a checkpoint fits any number of
stages. A step reshapes them to `[chunks, layers of a chunk, stages, ...]` before its first tick, and their gradients
back after its last one. This moves no data if every stage has the same number of consecutive layers; otherwise each
weight and its gradient cross the mesh axis `stage` once a step.

In JAX an *unreduced* array is a partial sum on each device; a *reduced* one is replicated, with *unreduced* gradients.
"""

from dataclasses import replace
from typing import Any, NoReturn, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.models.module import LayeredModule, StageLayers
from jaxinfra.objectives import losses
from jaxinfra.objectives.objective import Objective
from jaxinfra.ops.logits import with_unrolled_loops
from jaxinfra.parallel.pipeline import Pipeline, PipelineModel, StepInputs, without_stage
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Params, PyTree, select_trainable
from jaxinfra.program.build import build_module
from jaxinfra.program.engine import Function, GradientEngine, Gradients, split_microbatches
from jaxinfra.program.loss import Batch, ModelLoss, Sums, adds_partial_sums
from jaxinfra.user_code import user_code_errors

STACKED = "blocks"
"""Name of the parameters that are stacked over layers and split over stages; the stages share all others."""


def assign_layers(layers: int, stages: int, chunks: int) -> np.ndarray:
    """Returns the layer indices of each chunk of each stage, `[chunks, layers of a chunk, stages]`; -1 is padding.

    Chunk c of stage s is number `c * stages + s` in the order of the model. If the layers do not divide evenly, the
    first chunks have one more layer than the others: 5 layers on 2 stages of 1 chunk are `[[[0, 3], [1, 4], [2, -1]]]`.
    """
    parts = np.array_split(np.arange(layers), stages * chunks)
    longest = len(parts[0])
    padded = [np.pad(part, (0, longest - len(part)), constant_values=-1) for part in parts]
    return np.reshape(padded, (chunks, stages, longest)).transpose(0, 2, 1)


class LastStage:
    """The `objective.Apply` that an objective gets: computes the model's output from the last stage's activations."""

    def __init__(self, module: LayeredModule, x: jax.Array, batch: Batch, objective: Objective, *, unroll_loops: bool):
        self._module, self._x, self._batch, self.unroll_loops = module, x, batch, unroll_loops
        self._error = ConfigError(
            f"objective={type(objective).__name__}: needs a second forward pass, another batch, or the parameters "
            "themselves, but pipeline stages make one pass and hold parts of the parameters; use mesh.stage=1"
        )
        self.params = ParamsPlaceholder(self._error)
        self.partial_sums = adds_partial_sums(objective)
        self._called = False

    def __call__(self, params: object, batch: Batch, *, train: bool = True) -> Any:
        """Returns the output of the model for the microbatch."""
        # The layers have seen the batch: an objective cannot change it here.
        changed = any(batch.get(name) is not array for name, array in self._batch.items())
        if self._called or changed or not train or params is not self.params:
            raise self._error
        self._called = True
        return with_unrolled_loops(self._module.output(self._x), self.unroll_loops)


class ParamsPlaceholder:
    """Takes the place of the parameters, as no stage has all of them: an objective can only pass it to `apply`."""

    def __init__(self, error: ConfigError):
        self._error = error

    def __getitem__(self, name: str) -> NoReturn:
        raise self._error


class PipelineEngine(GradientEngine, PipelineModel):
    """Stages pass microbatches on, by a schedule.

    A model binds the shardings of its activations when it is built, so it is built once for its layers, and once for
    its output and the loss, whose rows or positions are sharded over stages.
    """

    def __init__(self, loss: ModelLoss, partitioner: Partitioner, stored: PyTree) -> None:
        super().__init__(loss, partitioner, stored)
        run = self.run
        rules, self.num_stages, self.chunks = partitioner.rules, partitioner.mesh.stage, run.pipeline.chunks
        dim = run.mesh_fit.loss_dim()
        assert dim is not None, "validate the run first"
        # The loss shards each microbatch over stages: its rows (dimension 0) or its positions (dimension 1). `stage` is
        # the last axis, since a device keeps part of the rows or positions that it has without stages.
        loss_axes = {"batch": (*rules.batch, "stage")} if dim == 0 else {"sequence": (*rules.sequence, "stage")}
        self.loss_partitioner = replace(partitioner, rules=replace(rules, block_sequence=(), **loss_axes))
        # Layers work on one microbatch per stage, `[stages * rows, ...]`: here `stage` is the first axis.
        layer_partitioner = replace(partitioner, rules=replace(rules, batch=("stage", *rules.batch)))
        module = build_module(run, layer_partitioner)
        if not isinstance(module, LayeredModule):
            raise ConfigError(
                f"mesh.stage={self.num_stages}: {type(run.model).__name__} does not build a LayeredModule, "
                "which pipeline stages need; use mesh.stage=1"
            )
        self._layers_graph, _ = nnx.split(module)
        self._output_graph, _ = nnx.split(build_module(run, self.loss_partitioner))
        layers = assign_layers(run.model.pipeline_periods, self.num_stages, self.chunks)
        # The number of layers of each chunk, in the model's order.
        self.chunk_lengths = [int(length) for length in (layers >= 0).sum(axis=1).reshape(-1)]
        self._uniform = module.uniform(layers)
        schedule = run.pipeline.make_schedule(self.num_stages, run.train.accumulate)
        loss_spec = self.loss_partitioner.spec("batch", "sequence", None)
        self.pipeline = Pipeline(self, schedule, loss_spec, layers, unroll_loops=partitioner.unroll_loops)

    # The model, as the pipeline calls it

    def _merge(self, graphdef: nnx.GraphDef[Any], params: dict[str, Any]) -> LayeredModule:
        """Returns the module with these parameters; the others, which the call does not use, stay `ParamSpec`s."""
        return nnx.merge(graphdef, nnx.State({**self.specs, **params}))

    @override
    def embed(self, shared: PyTree, rows: Batch) -> jax.Array:
        return self._merge(self._layers_graph, shared).embed(rows)

    @override
    def apply_layers(self, weights: PyTree, x: jax.Array, rows: Batch, layers: jax.Array) -> tuple[jax.Array, PyTree]:
        model = self._merge(self._layers_graph, {STACKED: weights})
        return model.apply_layers(x, rows, StageLayers(layers, self._uniform))

    @override
    def output_loss(self, shared: PyTree, x: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        # The specs of a validation batch include those of a training batch.
        batch = {
            name: jax.reshard(batch[name], self.loss_partitioner.spec("batch", *spec.axes))
            for name, spec in self.run.data.batch_spec(validation=True).items()
            if name in batch
        }
        objective = self.run.objective
        module, unroll_loops = self._merge(self._output_graph, shared), self.partitioner.unroll_loops
        forward = LastStage(module, x, batch, objective, unroll_loops=unroll_loops)
        with user_code_errors(type(objective), "objective"):
            return losses.check_result(objective, objective.loss(forward, forward.params, batch))

    @override
    def aux_loss(self, stats: PyTree) -> jax.Array | None:
        return self._merge(self._layers_graph, {}).aux_loss(stats)

    # A step

    @override
    def gradients(self, params: Params, batch: Batch, reference: Params | None) -> Gradients:
        layer_grads, shared_grads, sums, stats = self.pipeline.gradients(self._inputs(params, batch, reference))
        shared_grads = jax.tree.map(self._reduce_shared_grad, shared_grads, _shared_params(self.stored))
        layer_grads = jax.tree.map(self._join_layer_grad, layer_grads, self.stored[STACKED])
        stats = {name: self._join_layers(a) for name, a in _replicate(stats).items()}
        grads = select_trainable({**shared_grads, STACKED: layer_grads}, self.specs)
        return Gradients(grads, _replicate(sums), stats)

    @override
    def sums(self, params: Params, batch: Batch, reference: Params | None, of: Function) -> Sums:
        return _replicate(self.pipeline.evaluate(self._inputs(params, batch, reference)))

    def _inputs(self, params: Params, batch: Batch, reference: Params | None) -> StepInputs:
        """Splits the layers' weights over stages, and replicates the shared parameters over stages.

        Both are *reduced*, so that their gradients stay partial sums until the end of the step.
        """
        assert reference is None, "a config has no reference with stages (`Run.problems`)"
        batch = split_microbatches(batch, self.run.train.accumulate)

        def by_stage(stacked: jax.Array, stored: PartitionSpec) -> jax.Array:
            return jax.reshard(self._split_layers(stacked), self.partitioner.with_reduced(_by_stage(stored)))

        def replicated(param: jax.Array, stored: PartitionSpec) -> jax.Array:
            return jax.reshard(param, self.partitioner.with_reduced(_without_stage(stored), "stage"))

        return StepInputs(
            weights=jax.tree.map(by_stage, params[STACKED], self.stored[STACKED]),
            shared=jax.tree.map(replicated, _shared_params(params), _shared_params(self.stored)),
            batch=batch,
        )

    def _join_layer_grad(self, grad: jax.Array, stored: PartitionSpec) -> jax.Array:
        """Reduces and reshapes the gradient of the layers' weights to the shape and sharding of their parameter."""
        # Layers can be joined in their stored sharding, whichever dimension `stage` shards in it.
        by_layer = self._join_layers(jax.reshard(grad, PartitionSpec(None, None, *stored.partitions)))
        return jax.reshard(by_layer, stored)

    def _reduce_shared_grad(self, grad: jax.Array, stored: PartitionSpec) -> jax.Array:
        """Reduces a gradient over `stage` first, then over `replica`, so that only a shard crosses `replica`."""
        axes = jax.typeof(grad).sharding.spec.unreduced - {"stage"}
        return jax.reshard(jax.reshard(grad, stored.update(unreduced=axes)), stored)

    def _split_layers(self, stacked: jax.Array) -> jax.Array:
        """Reshapes `[layers, ...]` to `[chunks, layers of a chunk, stages, ...]`, padded with zeros."""
        longest, spec = max(self.chunk_lengths), jax.typeof(stacked).sharding.spec.partitions
        if min(self.chunk_lengths) < longest:  # 5 layers on 2 chunks: layers 0 to 2; layers 3, 4 and zeros
            assert spec[0] is None, spec  # `Partitioner.stored_spec` shards only layers that divide evenly
            parts = jnp.split(stacked, np.cumsum(self.chunk_lengths)[:-1])
            rest = [(0, 0)] * (stacked.ndim - 1)
            stacked = jnp.concatenate([jnp.pad(part, [(0, longest - len(part)), *rest]) for part in parts])
        shape = (self.chunks, self.num_stages, longest, *stacked.shape[1:])
        by_stage = stacked.reshape(shape, out_sharding=PartitionSpec(None, spec[0], None, *spec[1:]))
        return jnp.moveaxis(by_stage, 1, 2)

    def _join_layers(self, by_stage: jax.Array) -> jax.Array:
        """Inverts `_split_layers`."""
        _, _, layers_axes, *rest_axes = jax.typeof(by_stage).sharding.spec.partitions
        longest, rest = max(self.chunk_lengths), by_stage.shape[3:]
        by_stage = jnp.moveaxis(by_stage, 2, 1)  # [chunks, stages, layers of a chunk, ...]
        if min(self.chunk_lengths) == longest:
            return by_stage.reshape(-1, *rest, out_sharding=PartitionSpec(layers_axes, *rest_axes))
        shape = (len(self.chunk_lengths), longest, *rest)
        by_chunk = by_stage.reshape(shape, out_sharding=PartitionSpec(None, None, *rest_axes))
        return jnp.concatenate([by_chunk[i, :length] for i, length in enumerate(self.chunk_lengths)])


def _replicate(sums: Sums) -> Sums:
    """All-reduces partial sums."""
    return {name: jax.reshard(a, PartitionSpec()) for name, a in sums.items()}


def _shared_params(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name != STACKED}


def _by_stage(stored: PartitionSpec) -> PartitionSpec:
    """Returns the sharding of `[chunks, layers of a chunk, stages, ...]` for a stacked parameter."""
    return PartitionSpec(None, None, "stage", *_without_stage(stored).partitions[1:])


def _without_stage(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(without_stage(part) or None for part in spec.partitions))
