"""`Program`: the compiled functions of a run, on real devices, an abstract mesh or the topology of absent hardware.

Training, tests, benchmarks and `compile` (ahead-of-time compilation) use the same train step. Creating a `Program` uses
no device.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfra.models.adapt import packed_paths
from jaxinfra.models.module import LayerStats, Module
from jaxinfra.ops.dropout import DROPOUT_FIELD, token_bits
from jaxinfra.ops.mtp import MTP_FIELDS, later_tokens
from jaxinfra.ops.packed import pack_onto
from jaxinfra.optim import mup
from jaxinfra.optim.optimizers import make_optimizer
from jaxinfra.optim.schedules import optax_schedule
from jaxinfra.optim.transforms import clip_by_global_norm, ema_update
from jaxinfra.parallel.mesh import needs_unrolled_loops
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import LogicalAxes
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import (
    Params,
    ParamSpec,
    PyTree,
    leaves_by_name,
    merge_trees,
    param_key,
    select_trainable,
)
from jaxinfra.program.build import build_module, declared_params, narrow_module
from jaxinfra.program.canonical_engine import CanonicalEngine
from jaxinfra.program.engine import GradientEngine, Gradients, PlainEngine
from jaxinfra.program.loss import ROW_FIELD, Batch, ModelLoss, Sums
from jaxinfra.program.pipeline_engine import PipelineEngine
from jaxinfra.run import Run
from jaxinfra.run.compiler_options import compiler_options
from jaxinfra.user_code import user_code_errors

type Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a train step updates: saved, restored and donated together.

    Attributes:
        step: completed steps, int32.
        params: nested dict of arrays.
        opt_state: optax's state, sharded like the parameters.
        ema: moving average of the parameters in float32, or None.
        reference: frozen copy of the first parameters, for an objective that uses one, or None.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    reference: Params | None = None


class Program:
    """The compiled functions of a run, and the shapes and shardings that they work on.

    Attributes:
        run: the config.
        objective: the loss to minimize.
        mesh: the device mesh; on an `AbstractMesh` the functions can only be lowered.
        loss: computes the loss of a part of a batch.
        engine: splits a batch, and computes its gradients.
        partitioner: maps logical axes to shardings.
        specs: `ParamSpec` of every parameter, a nested dict.
        batch: name to `ShapeDtypeStruct` of the global batch.
        state: the train state as `ShapeDtypeStruct`s.
    """

    def __init__(self, run: Run, mesh: Mesh | AbstractMesh, platform: str | None = None, *, with_digests: bool = False):
        """Declares parameters and functions; compiles nothing.

        Raises ConfigError if a parameter does not fit the mesh, or `train.compiler` does not fit the platform.

        Args:
            run: a validated config.
            mesh: a mesh with the axes of `MeshConfig`.
            platform: "cpu", "gpu" or "tpu"; None asks the devices of the mesh.
            with_digests: in canonical mode, whether the metrics of a step have digests of what was computed on the way.
        """
        self.run, self.mesh, self.objective = run, mesh, run.objective
        platform = _platform(mesh) if platform is None else platform
        self._compiler_options = compiler_options(run.train.compiler, platform)
        # With several chunks a stage's layers are not consecutive, so stacked layers cannot be sharded over stages.
        rules = run.rules if run.pipeline.chunks == 1 else replace(run.rules, layers=())
        self.partitioner = Partitioner(
            rules=rules,
            mesh=MeshConfig(**dict(mesh.shape)),
            platform=platform,
            compute_dtype=jnp.dtype(run.precision.compute),
            quantize=run.precision.quantize,
            # A sum over positions does not depend on their order.
            zigzag=self.objective.by_position,
            alone=run.train.canonical is not None,
            # A virtual shard communicates with no other device.
            unroll_loops=run.train.canonical is None and needs_unrolled_loops(mesh),
        )
        self.module = build_module(run, self.partitioner)
        # A built module has a `ParamSpec` in place of each array. The trees below have the path of each parameter, its
        # declaration, and the `PartitionSpec` that it is stored with.
        self.graphdef, _ = nnx.split(self.module)
        self.specs, self._paths = declared_params(run, self.module)
        if (narrow := narrow_module(run, self.partitioner)) is not None:
            self.specs = mup.with_growth(self.specs, narrow[1])
        self._narrow = narrow
        self._stored = jax.tree.map(self.partitioner.stored_spec, self._paths, self.specs)
        self.loss = ModelLoss(run, self.module, self.graphdef, self.specs, unroll_loops=self.partitioner.unroll_loops)
        self.engine = _make_engine(self.loss, self.partitioner, self._stored, with_digests=with_digests)
        trainable_specs = select_trainable(self.specs, self.specs)
        self.optimizer = make_optimizer(run.optim, steps=run.train.steps, specs=trainable_specs)
        self._schedule = optax_schedule(run.optim.schedule, peak_lr=run.optim.peak_lr, steps=run.train.steps)

    # Shapes and shardings

    @property
    def on_mesh(self) -> AbstractContextManager[object]:
        """A context in which the functions of this program are traced and called."""
        if isinstance(self.mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self.mesh)
        return jax.set_mesh(self.mesh)

    def _sharded(self, shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    @cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one global batch."""
        return {name: self.validation_batch[name] for name in self.run.data.batch_spec(validation=False)}

    @cached_property
    def validation_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one global validation batch: those of `batch`, and the weights of samples."""
        rows = self.run.train.global_batch
        return {
            name: self._sharded((rows, *spec.shape), jnp.dtype(spec.dtype), self.engine.batch_spec(*spec.axes))
            for name, spec in self.run.data.batch_spec(validation=True).items()
        }

    @property
    def keeps_reference(self) -> bool:
        """Whether the state has the parameters of a reference, since the data lacks what they gave."""
        fields = self.objective.reference_fields
        return self.objective.uses_reference and not (fields and self.batch.keys() >= {*fields})

    @property
    def rows_per_device(self) -> float:
        """Samples of a global batch on one device; a fraction if devices share a sample."""
        return self.run.train.global_batch / self.engine.num_row_shards

    @cached_property
    def params(self) -> Params:
        """The parameters as they are stored, as `ShapeDtypeStruct`s."""
        return jax.tree.map(lambda s, p: self._sharded(s.shape, self._dtype(s), p), self.specs, self._stored)

    def params_stored_as(self, dtype: str) -> Params:
        """Returns the parameters as `ShapeDtypeStruct`s, in this dtype except for buffers."""
        return jax.tree.map(
            lambda p, s: p if s.state == "buffer" else p.update(dtype=jnp.dtype(dtype)), self.params, self.specs
        )

    @cached_property
    def base(self) -> "Program":
        """The program of the model alone, whose parameters this one begins with; itself if both have the same ones."""
        run, precision = self.run, self.run.precision
        if run.adapter is None and precision.packed is None:
            return self
        dtype = precision.compute if precision.packed else precision.frozen or precision.params
        alone = replace(run, adapter=None, precision=replace(precision, params=dtype, frozen=None))
        return Program(alone, self.mesh, self.partitioner.platform)

    def from_base(self, path: str, array: jax.Array) -> dict[str, jax.Array]:
        """Returns what this program stores in place of a parameter of `base`, by path: itself, or codes and scales."""
        named, (codes, scale) = leaves_by_name(self.params), packed_paths(path)
        if scale not in named:
            return {path: array}
        shapes = named[codes], named[scale]
        in_dims = leaves_by_name(self.specs)[codes].in_dims
        with self.on_mesh:
            return dict(zip((codes, scale), pack_onto(array, in_dims, shapes), strict=True))

    @cached_property
    def averaged_params(self) -> Params:
        """The averaged parameters of a run that keeps them, as `ShapeDtypeStruct`s: float32."""
        return jax.tree.map(lambda p: p.update(dtype=jnp.dtype("float32")), self.kept(self.params))

    def _dtype(self, spec: ParamSpec) -> jnp.dtype:
        """Returns the dtype in which a parameter is stored."""
        precision = self.run.precision
        frozen = precision.compute if precision.packed else precision.frozen or precision.params
        return jnp.dtype(spec.dtype or (frozen if spec.state == "frozen" else precision.params))

    @cached_property
    def state(self) -> TrainState:
        """The train state as `ShapeDtypeStruct`s."""
        with self.on_mesh:
            shapes = jax.eval_shape(self._from_params, self.params)

        def with_mesh(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # The counters in optax's state have no sharding.
            spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
            return self._sharded(leaf.shape, leaf.dtype, spec)

        def on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # Counters stay on the devices (see `optim.offload`).
            assert leaf.sharding is not None
            return leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host")) if leaf.ndim else leaf

        state = jax.tree.map(with_mesh, shapes)
        if self.run.optim.offload:  # set here, as `eval_shape` drops the memory kind
            state = replace(state, opt_state=jax.tree.map(on_host, state.opt_state))
        return state

    @cached_property
    def saved(self) -> TrainState:
        """The part of the state that a checkpoint holds, as `ShapeDtypeStruct`s."""
        return self.to_save(self.state)

    def to_save(self, state: TrainState) -> TrainState:
        """Returns what a checkpoint holds of a state: with an adapter nothing that is frozen, which is in its base."""
        return replace(state, params=self.kept(state.params))

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(spec.size for spec in jax.tree.leaves(self.specs))

    @property
    def flops_per_sample(self) -> float | None:
        """FLOPs of training on one sequence or image; None if the model does not tell."""
        data, flops = self.run.data, self.module.flops(self.run.data)
        if flops is None:
            return None
        return flops + self.module.flops_of_changes(data, leaves_by_name(self.specs), leaves_by_name(self.base.specs))

    # Functions

    def model(self, params: Params) -> Module:
        """Returns the module with these parameters, for use while tracing."""
        return self.loss.model(params)

    def kept(self, params: Params) -> Params:
        """Returns those of the parameters that a checkpoint holds (see `to_save`)."""
        return params if self.run.adapter is None else select_trainable(params, self.specs)

    @cached_property
    def init(self) -> Callable[[jax.Array], TrainState]:
        """`init(key) -> TrainState`, compiled; the numbers depend on the key, not on the mesh."""
        return jax.jit(lambda key: self._from_params(self.engine.make_params(self._init_params, key)))

    @cached_property
    def init_from(self) -> Callable[[Params], TrainState]:
        """`init_from(params) -> TrainState`, compiled: the first state of a run that starts from other parameters.

        Adapters that they lack are initialized.
        """

        def init(params: Params) -> TrainState:
            with_adapters = self._init_params(jax.random.key(self.run.seed), self._stored)
            return self._from_params(merge_trees(with_adapters, params))

        return jax.jit(self._from_params if self.run.adapter is None else init)

    @cached_property
    def train_step(self) -> jax.stages.Wrapped:
        """`train_step(state, batch) -> (state, metrics)`, compiled; it donates the state."""
        return jax.jit(self._train_step, donate_argnums=0, compiler_options=self._compiler_options or None)

    @cached_property
    def eval_step(self) -> jax.stages.Wrapped:
        """`eval_step(params, batch, reference=None) -> sums`, compiled: the objective's sums over a batch."""
        return jax.jit(self._eval_step, compiler_options=self._compiler_options or None)

    @cached_property
    def reference_step(self) -> jax.stages.Wrapped:
        """`reference_step(params, batch) -> values`, compiled: `Objective.reference_values` of the global batch."""

        def values(params: Params, batch: Batch) -> Sums:
            rows = jax.reshard(jnp.arange(self.run.train.global_batch), self.engine.batch_spec())
            batch = {**self._to_shard_order(batch), ROW_FIELD: rows}
            return self.engine.sums(params, batch, None, self.loss.reference_values)

        return jax.jit(values, compiler_options=self._compiler_options or None)

    @cached_property
    def all_finite(self) -> Callable[[TrainState], jax.Array]:
        """`all_finite(state) -> bool scalar`, compiled: whether no parameter is NaN or infinite."""

        def check(state: TrainState) -> jax.Array:
            floating = [a for a in jax.tree.leaves((state.params, state.ema)) if jnp.issubdtype(a.dtype, jnp.floating)]
            return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a)) for a in floating]))

        return jax.jit(check)

    @cached_property
    def gradients(self) -> Callable[..., tuple[Params, Sums, LayerStats]]:
        """`gradients(params, batch, reference=None)`: those of the mean loss, with sums and statistics; compiled."""

        def gradients(params: Params, batch: Batch, reference: Params | None = None) -> tuple[Params, Sums, LayerStats]:
            return self._gradients(params, batch, reference)[:3]

        return jax.jit(gradients)

    def lower(self) -> jax.stages.Lowered:
        """Lowers the train step for the platform, from shapes alone."""
        with self.on_mesh:
            platform = "cuda" if self.partitioner.platform == "gpu" else self.partitioner.platform
            return self.train_step.trace(self.state, self.batch).lower(lowering_platforms=(platform,))

    def _init_params(self, key: jax.Array, shardings: PyTree) -> Params:
        def init_param(path: str, spec: ParamSpec, out: PartitionSpec) -> jax.Array:
            return spec.init(param_key(key, path), spec.shape, self._dtype(spec), out)

        def draw(module: Module, specs: PyTree, shardings: PyTree) -> Params:
            params = module.init_params(key, shardings)  # of Flax, without `ParamSpec`s with initializers; else None
            return jax.tree.map(init_param, self._paths, specs, shardings) if params is None else params

        params = draw(self.module, self.specs, shardings)
        if self._narrow is None:
            return params
        narrow = draw(*self._narrow, jax.tree.map(lambda _: PartitionSpec(), self._paths))
        return mup.rescale(params, narrow, self.specs, self.run.width_ratio)

    def _from_params(self, params: Params) -> TrainState:
        """Returns the state before the first step."""
        params = jax.tree.map(lambda p, s: p.astype(self._dtype(s)), params, self.specs)
        keeps_average = self.run.optim.ema_decay is not None
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(select_trainable(params, self.specs)),
            ema=jax.tree.map(lambda p: p.astype(jnp.float32), self.kept(params)) if keeps_average else None,
            reference=jax.tree.map(jnp.copy, self.kept(params)) if self.keeps_reference else None,
        )

    def with_dropout_bits(self, batch: Batch, step: jax.Array | int) -> Batch:
        """Adds the random bits that dropout needs to the batch of a step, uint32 for each position."""
        model, data = self.run.model, self.run.data
        if not model.uses_dropout:
            return batch
        key = param_key(jax.random.key(self.run.seed), DROPOUT_FIELD)
        shape = (self.run.train.global_batch, model.positions(data))
        bits = token_bits(key, jnp.asarray(step), shape, self.engine.batch_spec("sequence"))
        return {**batch, DROPOUT_FIELD: bits}

    def _to_shard_order(self, batch: Batch) -> Batch:
        """Reorders the positions of sequences into shard order, which the model expects (see `parallel.context`)."""
        sharding = self.partitioner.sequence_sharding
        if sharding.blocks_per_shard == 1:
            return batch

        def reorder(x: jax.Array, axes: LogicalAxes) -> jax.Array:
            if "sequence" not in axes:
                return x
            # The order changes on whole sequences, which are sharded again afterwards.
            whole = self.partitioner.spec(*(None if name == "sequence" else name for name in axes))
            reordered = sharding.to_shard_order(jax.reshard(x, whole), axes.index("sequence"))
            return jax.reshard(reordered, self.partitioner.spec(*axes))

        # The fields of a validation batch include those of a training batch.
        fields = self.run.data.batch_spec(validation=True)
        axes = {name: ("batch", *spec.axes) for name, spec in fields.items()} | {DROPOUT_FIELD: ("batch", "sequence")}
        axes |= dict.fromkeys(MTP_FIELDS, ("batch", None, "sequence"))
        return {name: reorder(x, axes[name]) for name, x in batch.items()}

    def _to_step_batch(self, params: Params, batch: Batch, reference: Params | None) -> Batch:
        """Returns a batch in shard order, with what the objective needs to know of all of it, before it is split."""
        batch = self._to_shard_order(batch)
        if not self.objective.statistics_fields:
            return batch
        sums = self.engine.sums(params, batch, reference, self.loss.statistics)
        rows = self.run.train.global_batch, self.engine.batch_spec()
        return {**batch, **{name: jax.reshard(jnp.full(rows[0], value), rows[1]) for name, value in sums.items()}}

    def _gradients(self, params: Params, batch: Batch, reference: Params | None = None) -> Gradients:
        """Returns the gradients of the mean loss, and the sums and statistics of the batch."""
        if depths := self.run.mtp_depths:
            batch = {**batch, **later_tokens(batch, depths)}
        found = self.engine.gradients(params, self._to_step_batch(params, batch, reference), reference)
        return found._replace(grads=self.engine.mean(found.grads, found.sums["weight"]))

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = self.with_dropout_bits(batch, state.step)
        grads, sums, stats, digests = self._gradients(state.params, batch, state.reference)
        metrics = {name: value / sums["weight"] for name, value in sums.items() if name != "weight"}
        model = self.model(state.params)
        metrics |= model.metrics(stats, sums["weight"])
        metrics |= {"weight": sums["weight"], "lr": jnp.asarray(self._schedule(state.step)), **digests}
        clip = partial(clip_by_global_norm, max_norm=self.run.optim.clip_norm)
        clip, update = self.engine.with_exact_rounding(clip, self._apply_gradients, grads)
        grads, metrics["grad_norm"] = clip(grads)
        arguments = state, grads, model.update_buffers(stats)
        if not self.run.guard.skip_nonfinite:
            return update(*arguments), metrics
        # A branch, not a select: an optimizer that is not elementwise, such as Muon, would need the old and the new
        # state at once.
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        metrics["skipped"] = 1.0 - is_finite
        return jax.lax.cond(is_finite, update, self._skip_update, *arguments), metrics

    def _skip_update(self, state: TrainState, grads: Params, buffers: Params) -> TrainState:
        return replace(state, step=state.step + 1)

    def _apply_gradients(self, state: TrainState, grads: Params, buffers: Params) -> TrainState:
        optim, trainable = self.run.optim, select_trainable(state.params, self.specs)
        with user_code_errors(type(optim.optimizer), "optim.optimizer"):
            updates, opt_state = self.optimizer.update(grads, state.opt_state, trainable)
        # Added in float32, also if parameters are stored in bfloat16.
        trained = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), trainable, updates)
        params = merge_trees(state.params, trained)
        if self.run.adapter is None:  # else buffers are frozen
            params = merge_trees(params, buffers)
        ema = state.ema
        if optim.ema_decay is not None:
            ema = ema_update(ema, self.kept(params), optim.ema_decay, state.step)
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state, ema=ema)

    def _eval_step(self, params: Params, batch: Batch, reference: Params | None = None) -> Sums:
        return self.engine.sums(params, self._to_step_batch(params, batch, reference), reference, self.loss.sums)


def _make_engine(loss: ModelLoss, partitioner: Partitioner, stored: PyTree, *, with_digests: bool) -> GradientEngine:
    if loss.run.train.canonical is not None:
        return CanonicalEngine(loss, partitioner, stored, with_digests=with_digests)
    if partitioner.mesh.stage > 1:
        return PipelineEngine(loss, partitioner, stored)
    return PlainEngine(loss, partitioner, stored)


def _platform(mesh: Mesh | AbstractMesh) -> str:
    """Returns "cpu", "gpu" or "tpu"; an abstract mesh stands for CPUs."""
    if isinstance(mesh, AbstractMesh):
        return "cpu"
    platform = np.asarray(mesh.devices).flat[0].platform
    return "gpu" if platform == "cuda" else str(platform)
