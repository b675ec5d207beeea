"""`Program`: all that is compiled of a run, on real devices, an abstract mesh or a described topology.

A run is described once and built once: the step that trains is the one that is lowered in tests, timed in
benchmarks and planned for hardware that nobody here has. Building a `Program` touches no device.

The train step, in the order of its collectives: parameters are marked as reduced over `replica`; each microbatch
gathers its weights over `fsdp` layer by layer and scatters their gradients back, and adds them to a buffer that
is a partial sum over `replica`; after the last microbatch that buffer crosses `replica`, once; then the update.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfra.compiler import options
from jaxinfra.ops.dropout import DROPOUT_FIELD, token_bits
from jaxinfra.optim.optimizers import make_optimizer
from jaxinfra.optim.schedules import optax_schedule
from jaxinfra.optim.transforms import clip_by_global_norm, ema_update
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import LogicalAxes
from jaxinfra.parallel.sharding import Partitioner, unreduced_zeros
from jaxinfra.parallel.spec import ParamSpec, merge_trees, param_key, select_trainable
from jaxinfra.stages import Stages
from jaxinfra.tasks.task import loss

if TYPE_CHECKING:
    from jaxinfra.run import Run

type Batch = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that training changes: saved, restored and donated as one.

    Attributes:
        step: finished steps, int32.
        params: nested dict of arrays.
        opt_state: optax's state, sharded like the parameters.
        ema: moving average of the parameters in float32, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any


class Program:
    """The compiled side of a run.

    Attributes:
        run: the config.
        family: the config of its model.
        task: what it is trained for.
        data: what it is trained on.
        mesh: where it runs; an `AbstractMesh` can be lowered on but not run.
        partitioner: names to shardings.
        specs: `ParamSpec` of every parameter, a nested dict.
        batch: name to `ShapeDtypeStruct` of the global batch.
        state: the train state as `ShapeDtypeStruct`s.
    """

    def __init__(self, run: "Run", mesh: Mesh | AbstractMesh, platform: str | None = None):
        """Declares everything; compiles nothing.

        The run is validated and the mesh has the axes of `MeshConfig`; a parameter that does not fit it, or a
        `train.compiler` that does not fit the platform, is a ConfigError.
        `platform` is "cpu", "gpu" or "tpu"; None asks the devices of the mesh.
        """
        self.run, self.mesh = run, mesh
        self.family, self.task, self.data = run.parts
        if platform is None:
            platform = "cpu" if isinstance(mesh, AbstractMesh) else str(np.asarray(mesh.devices).flat[0].platform)
        self._options = options(run.train.compiler, {"cuda": "gpu"}.get(platform, platform))
        # The chunks of a stage are not consecutive: its layers are then not stored on it.
        rules = run.rules if run.pipeline.chunks == 1 else replace(run.rules, layers=())
        self.partitioner = Partitioner(
            rules=rules,
            mesh=MeshConfig(**dict(mesh.shape)),
            platform=platform,
            compute_dtype=jnp.dtype(run.precision.compute),
            quantize=run.precision.quantize,
            # A loss over single positions does not ask where they stand.
            zigzag=self.task.by_position,
        )
        self.graphdef, specs = nnx.split(run.model.build(self.partitioner))
        self.specs: dict[str, Any] = nnx.to_pure_dict(specs)
        dotted = partial(jax.tree_util.keystr, simple=True, separator=".")
        self._paths = jax.tree.map_with_path(lambda path, _: dotted(path), self.specs)
        self._stored = jax.tree.map(self.partitioner.stored_spec, self._paths, self.specs)
        staged = self.partitioner.mesh.stage > 1
        self._stages = Stages(run, self.partitioner, self.specs, self._stored) if staged else None
        trainable = select_trainable(self.specs, self.specs)
        self.optimizer = make_optimizer(run.optim, steps=run.train.steps, specs=trainable)
        self._schedule = optax_schedule(run.optim.schedule, peak_lr=run.optim.peak_lr, steps=run.train.steps)

    # What it works on

    @property
    def on_mesh(self) -> Any:
        """A context in which the functions of this program are traced and called."""
        if isinstance(self.mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self.mesh)
        return jax.set_mesh(self.mesh)

    def _sharded(self, shape: tuple[int, ...], dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    @cached_property
    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one global batch."""
        return self._batch(validation=False)

    @cached_property
    def validation_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of one global batch of validation data: those of `batch`, and weights."""
        return self._batch(validation=True)

    def _batch(self, *, validation: bool) -> dict[str, jax.ShapeDtypeStruct]:
        fields = self.task.batch(self.data, self.run.train.global_batch, validation=validation)
        return {n: self._sharded(f.shape, f.dtype, self.partitioner.spec(*f.axes)) for n, f in fields.items()}

    @cached_property
    def params(self) -> Any:
        """The parameters as they are stored, as `ShapeDtypeStruct`s."""
        return jax.tree.map(lambda s, p: self._sharded(s.shape, self._dtype(s), p), self.specs, self._stored)

    def _dtype(self, spec: ParamSpec) -> jnp.dtype:
        return jnp.dtype(self.run.precision.params if spec.trainable else "float32")

    @cached_property
    def state(self) -> TrainState:
        """The train state as `ShapeDtypeStruct`s."""
        with self.on_mesh:
            shapes = jax.eval_shape(self._from_params, self.params)

        def concrete(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec  # None: a counter of optax
            return self._sharded(leaf.shape, leaf.dtype, spec)

        state = jax.tree.map(concrete, shapes)
        # Shapes that are evaluated forget the memory that an array is in.
        host = self.run.optim.offload
        return replace(state, opt_state=jax.tree.map(_on_host, state.opt_state)) if host else state

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(spec.size for spec in jax.tree.leaves(self.specs))

    # What it does

    def model(self, params: Any) -> Any:
        """The module with these parameters, for use while tracing."""
        return nnx.merge(self.graphdef, nnx.State(params))

    @cached_property
    def init(self) -> Any:
        """`init(key) -> TrainState`, compiled; the numbers depend on the key, not on the mesh."""
        return jax.jit(lambda key: self._from_params(self._init_params(key)))

    @cached_property
    def train_step(self) -> Any:
        """`train_step(state, batch) -> (state, metrics)`, compiled; the old state is given up."""
        return jax.jit(self._train_step, donate_argnums=0, compiler_options=self._options or None)

    @cached_property
    def eval_step(self) -> Any:
        """`eval_step(params, batch) -> sums`, compiled: the task's sums over the batch, replicated scalars."""
        return jax.jit(self._eval_step, compiler_options=self._options or None)

    @cached_property
    def gradients(self) -> Any:
        """`gradients(params, batch) -> (grads, sums)`, compiled: of the mean loss over the whole batch."""
        return jax.jit(self._gradients)

    def lower(self) -> Any:
        """The train step, lowered for `platform` from shapes alone."""
        with self.on_mesh:
            traced = self.train_step.trace(self.state, self.batch)
            platform = {"gpu": "cuda"}.get(self.partitioner.platform, self.partitioner.platform)
            return traced.lower(lowering_platforms=(platform,))

    def _init_params(self, key: jax.Array) -> Any:
        def one(path: str, spec: ParamSpec, out: PartitionSpec) -> jax.Array:
            return spec.init(param_key(key, path), spec.shape, self._dtype(spec), out)

        return jax.tree.map(one, self._paths, self.specs, self._stored)

    def _from_params(self, params: Any) -> TrainState:
        averaged = self.run.optim.ema_decay is not None
        ema = jax.tree.map(lambda p: p.astype(jnp.float32), params) if averaged else None
        opt_state = self.optimizer.init(select_trainable(params, self.specs))
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state, ema=ema)

    def with_words(self, batch: Batch, step: jax.Array | int) -> Batch:
        """The batch of a step with what decides about dropout: random words of its positions, if there is any."""
        if self.family.dropout == 0:
            return batch
        key = param_key(jax.random.key(self.run.seed), DROPOUT_FIELD)
        shape = (self.run.train.global_batch, self.family.positions(self.data))
        return {
            **batch,
            DROPOUT_FIELD: token_bits(key, jnp.asarray(step), shape, self.partitioner.spec("batch", "sequence")),
        }

    def _loss_and_grads(self, params: Any, batch: Batch) -> tuple[dict[str, jax.Array], Any]:
        """Sums of one microbatch and the float32 gradient of its summed loss, both partial over `replica`."""

        def total_and_sums(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss(self.task, self.model(params), batch)

        total, pull, sums = jax.vjp(total_and_sums, params, has_aux=True)
        over = jax.typeof(total).sharding.spec.unreduced
        (grads,) = pull(jnp.ones((), jnp.float32, out_sharding=PartitionSpec(reduced=over)))
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    def _arranged(self, batch: Batch) -> Batch:
        """The batch with sequence positions in shard order, as the model expects them."""
        sharding = self.partitioner.sequence_sharding
        if sharding.blocks_per_shard == 1:
            return batch

        def one(x: jax.Array, axes: LogicalAxes) -> jax.Array:
            if "sequence" not in axes:
                return x
            whole = self.partitioner.spec(*(None if name == "sequence" else name for name in axes))
            arranged = sharding.to_shard_order(jax.reshard(x, whole), axes.index("sequence"))
            return jax.reshard(arranged, self.partitioner.spec(*axes))

        fields = self.task.batch(self.data, self.run.train.global_batch, validation=True)
        axes = {name: field.axes for name, field in fields.items()} | {DROPOUT_FIELD: ("batch", "sequence")}
        return {name: one(x, axes[name]) for name, x in batch.items()}

    def _gradients(self, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """The gradient of the mean loss, by what is trained, and the sums; `replica` is crossed once."""
        batch = self._arranged(batch)
        count = self.run.train.accumulate
        if self._stages is not None:
            grads, sums = self._stages.gradients(params, _split(batch, count))
            scale = 1.0 / jnp.maximum(sums["weight"], 1.0)
            return jax.tree.map(lambda g: g * scale, select_trainable(grads, self.specs)), sums
        marked = jax.tree.map(lambda p, s: jax.reshard(p, self.partitioner.with_reduced(s)), params, self._stored)
        if count == 1:
            sums, grads = self._loss_and_grads(marked, batch)
        else:
            microbatches = _split(batch, count)
            first = jax.tree.map(lambda x: x[0], microbatches)
            shapes = jax.eval_shape(self._loss_and_grads, marked, first)
            # From zeros and not from the first microbatch, so that the model is compiled once, inside the loop.
            zeros = jax.tree.map(lambda a: unreduced_zeros(a.shape, a.dtype, a.sharding.spec), shapes)

            def body(total: Any, microbatch: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, self._loss_and_grads(marked, microbatch)), None

            (sums, grads), _ = jax.lax.scan(body, zeros, microbatches)
        sums = jax.tree.map(lambda s: jax.reshard(s, PartitionSpec()), sums)
        scale = 1.0 / jnp.maximum(sums["weight"], 1.0)
        grads, stored = (select_trainable(tree, self.specs) for tree in (grads, self._stored))
        return jax.tree.map(lambda g, s: jax.reshard(g, s) * scale, grads, stored), sums

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        optim = self.run.optim
        grads, sums = self._gradients(state.params, self.with_words(batch, state.step))
        grads, norm = clip_by_global_norm(grads, optim.clip_norm)
        before = select_trainable(state.params, self.specs)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, before)
        after = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), before, updates)
        totals = {name: value for name, value in sums.items() if not value.ndim}
        stats = {name: value for name, value in sums.items() if value.ndim}
        model = self.model(state.params)
        params = merge_trees(merge_trees(state.params, after), model.update_buffers(stats))
        ema = state.ema if optim.ema_decay is None else ema_update(state.ema, params, optim.ema_decay, state.step)
        metrics = {name: value / sums["weight"] for name, value in totals.items() if name != "weight"}
        metrics |= model.metrics(stats, sums["weight"])
        metrics |= {"weight": sums["weight"], "grad_norm": norm, "lr": jnp.asarray(self._schedule(state.step))}
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    def _eval_step(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        batch = self._arranged(batch)
        if self._stages is not None:
            return self._stages.evaluate(params, _split(batch, self.run.train.accumulate))
        _, sums = loss(self.task, self.model(params), batch)
        return jax.tree.map(lambda s: jax.reshard(s, PartitionSpec()), sums)


def _on_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Like `optim.offload`: an array, not a counter, in host memory."""
    assert isinstance(leaf.sharding, NamedSharding)
    return leaf.update(sharding=leaf.sharding.with_memory_kind("pinned_host")) if leaf.ndim else leaf


def _split(batch: Batch, count: int) -> Batch:
    """The batch as `count` microbatches, stacked.

    Microbatch i has the rows r with `r % count == i`: no row leaves its device.
    """

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, dict(batch))
