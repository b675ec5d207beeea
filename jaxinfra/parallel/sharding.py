"""Shardings of arrays, from the logical names of their dimensions, and the resharding operations of a model.

A model names dimensions ("batch", "embed", "heads", ...). `ShardingRules` maps the names to mesh axes, and
`Partitioner` turns names into `PartitionSpec`s. To try another sharding, change one field of the rules.

In JAX's explicit sharding, *unreduced* means that each device holds a partial sum; *reduced* means replicated, with an
*unreduced* gradient. A weight is *stored* as `f32[D@fsdp, F@tensor]` (D sharded over the mesh axis `fsdp`) and *used*
as `f32[D, F@tensor]{R: replica, fsdp, context}`: all-gathered over `fsdp`, and reduced over every axis that shards the
activations. So its gradient is unreduced over these axes. It is reduce-scattered over `fsdp` immediately, and over
`replica` once at the end of the step.

Shape suffixes: B batch, T length, D hidden size, F hidden size of the MLP.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import LogicalAxes, Quantize, ShardingRules
from jaxinfra.parallel.spec import ParamSpec

type SpecEntry = str | tuple[str, ...] | None
"""The mesh axes of one dimension in a `PartitionSpec`."""

GATHERED_WEIGHT = "gathered"
"""The checkpoint name of an all-gathered weight: remat policies gather it again instead of saving it."""

RESHARDED = "resharded"
"""The checkpoint name of a resharded activation, by which `models.remat` can save it in place of the `reshard`."""

MAX_UNROLLED_LAYERS = 16
"""The longest scan over layers that is unrolled on a single CPU device; compile time grows with it."""

STAGES = "stages"
"""The logical axis over pipeline stages, of weights with one layer per stage."""


@dataclass(frozen=True, kw_only=True)
class Partitioner:
    """Turns logical axes into shardings, for one model on one mesh.

    Mesh axes of size 1 never appear in a sharding.

    Attributes:
        rules: maps logical axes to mesh axes.
        mesh: size of every mesh axis; none is -1.
        platform: "cpu", "gpu" or "tpu"; selects kernels.
        compute_dtype: dtype of gathered weights.
        quantize: number format of matmuls with the layers' weights.
        zigzag: whether sharded sequences are in zigzag order (see `parallel.context`).
        alone: whether every device applies the whole model to rows of its own, in a `shard_map` over all mesh axes (see
            `parallel.canonical`). Then the mesh shards only stored parameters.
        unroll_loops: whether loops whose steps communicate are unrolled (see `mesh.needs_unrolled_loops`).
    """

    rules: ShardingRules = ShardingRules()
    mesh: MeshConfig = MeshConfig(fsdp=1)
    platform: str = "cpu"
    compute_dtype: jnp.dtype = jnp.dtype("float32")
    quantize: Quantize = "none"
    zigzag: bool = False
    alone: bool = False
    unroll_loops: bool = False

    @property
    def stored(self) -> "Partitioner":
        """The partitioner of stored parameters, which are sharded over the mesh also with `alone`."""
        return replace(self, alone=False) if self.alone else self

    @property
    def sequence_sharding(self) -> SequenceSharding:
        """How sequences are sharded for context parallelism."""
        axes, num_shards = self.mesh_axes("sequence"), self.num_shards("sequence")
        return SequenceSharding(axes=axes, num_shards=num_shards, zigzag=self.zigzag, unroll_loops=self.unroll_loops)

    def unrolls_layers(self, count: int) -> bool:
        """Returns whether a scan over `count` layers is unrolled: all with `unroll_loops`, short ones on a single CPU.

        There a loop takes a fifth of a small step: it copies each layer's weights out of the stacks, and activations
        and gradients into others. A mesh keeps its loops, whose collectives may then overlap.
        """
        single = self.platform == "cpu" and not self.alone and math.prod(self.mesh.sizes) == 1
        return self.unroll_loops or (single and count <= MAX_UNROLLED_LAYERS)

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """Returns the mesh axes of a logical axis (see `ShardingRules.mesh_axes`)."""
        if name is None or self.alone:
            return ()
        axes = ("stage",) if name == STAGES else self.rules.mesh_axes(name)
        return tuple(axis for axis in axes if getattr(self.mesh, axis) > 1)

    def num_shards(self, name: str | None) -> int:
        """Returns the number of shards of a logical axis."""
        return self.mesh.shards(*self.mesh_axes(name))

    def spec(self, *names: str | None) -> PartitionSpec:
        """Returns the sharding of an activation with these logical axes."""
        return PartitionSpec(*(self.mesh_axes(name) or None for name in names))

    def _param_axes(self, name: str | None, names: LogicalAxes) -> tuple[str, ...]:
        """Returns the mesh axes of the dimension `name` of a parameter with these `names`.

        In a parameter of experts, "embed" does not use the axes of "experts", which shard another dimension of it.
        """
        taken = self.mesh_axes("experts") if name == "embed" and "experts" in names else ()
        return tuple(axis for axis in self.mesh_axes(name) if axis not in taken)

    def stored_spec(self, path: str, spec: ParamSpec) -> PartitionSpec:
        """Returns the sharding in which a parameter is stored.

        `stage` shards stacked layers if it divides them, and "embed" of all other parameters.

        Raises:
            ConfigError: two dimensions use one mesh axis, or a dimension is not divisible by its shards.
        """
        if self.alone:
            return self.stored.stored_spec(path, spec)
        axes = [self._param_axes(name, spec.axes) for name in spec.axes]
        if "layers" in spec.axes:
            dim = spec.axes.index("layers")
            if spec.shape[dim] % self.num_shards("layers"):
                axes[dim] = ()
        if "embed" in spec.axes and self.mesh.stage > 1 and not any("stage" in used for used in axes):
            dim = spec.axes.index("embed")
            if spec.shape[dim] % (self.num_shards("embed") * self.mesh.stage) == 0:
                axes[dim] = (*axes[dim], "stage")
        names_by_axis: dict[str, str | None] = {}
        for size, name, used in zip(spec.shape, spec.axes, axes, strict=True):
            for axis in used:
                if axis in names_by_axis:
                    raise ConfigError(
                        f"rules.{name}, rules.{names_by_axis[axis]}: mesh axis {axis} shards two dimensions of "
                        f"parameter {path} {spec.shape}; remove {axis} from one of them"
                    )
                names_by_axis[axis] = name
            if size % self.mesh.shards(*used):
                raise ConfigError(
                    f"rules.{name}={self.mesh_axes(name)}: {name} of parameter {path} {spec.shape} has size {size}, "
                    f"which is not divisible by {self.num_shards(name)} shards; use another mesh or rules.{name}=()"
                )
        return PartitionSpec(*(used or None for used in axes))

    def compute_spec(self, names: LogicalAxes, activation_axes: LogicalAxes) -> PartitionSpec:
        """Returns the sharding of a weight for a matmul with an activation that is sharded over `activation_axes`.

        If `fsdp` shards the batch, a weight stored as `[D@fsdp, F@tensor]` is used as `[D, F@tensor]`.
        """
        reduced = {axis for name in activation_axes for axis in self.mesh_axes(name)}
        if names[:1] == (STAGES,):
            reduced -= {"stage"}  # each stage has its own rows and weights
        if "experts" in names:
            reduced -= {*self.mesh_axes("experts")}  # tokens are sent to their experts, on one shard each
        kept = (tuple(axis for axis in self._param_axes(name, names) if axis not in reduced) for name in names)
        return PartitionSpec(*(axes or None for axes in kept), reduced=frozenset(reduced))

    def gather_weight(
        self,
        value: jax.Array,
        names: LogicalAxes,
        activation_axes: LogicalAxes = ("batch", "sequence"),
        dtype: jnp.dtype | None = None,
    ) -> jax.Array:
        """Prepares a stored weight for use: casts it, all-gathers it, and makes it *reduced*.

        Args:
            value: the parameter, or one layer of it.
            names: the logical axes of one layer; a `value` with one more dimension has one layer per pipeline stage.
            activation_axes: the sharded logical axes of the activation.
            dtype: overrides `compute_dtype`.
        """
        if value.ndim > len(names):
            names = (STAGES, *names)
        value = value.astype(dtype or self.compute_dtype)
        return checkpoint_name(jax.reshard(value, self.compute_spec(names, activation_axes)), GATHERED_WEIGHT)

    def lookup_table(self, table: jax.Array, name: str) -> tuple[jax.Array, PartitionSpec]:
        """Prepares an embedding table for lookups in which each device reads its own columns.

        Returns:
            The table with unsharded rows and columns sharded by `name`, and the sharding of the result
            `[B, T, columns]`.
        """
        columns = self.mesh_axes(name)
        batch, sequence = self._without(columns)
        used = PartitionSpec(None, columns or None, reduced=frozenset((*batch, *sequence)))
        result = PartitionSpec(batch or None, sequence or None, columns or None)
        return jax.reshard(table.astype(self.compute_dtype), used), result

    def _without(self, axes: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the mesh axes of "batch" and of "sequence" that are not in `axes`."""
        batch, sequence = self.mesh_axes("batch"), self.mesh_axes("sequence")
        return tuple(axis for axis in batch if axis not in axes), tuple(axis for axis in sequence if axis not in axes)

    def reshard_to_tokens(self, x_BTD: jax.Array, name: str) -> jax.Array:
        """Moves the result of a lookup in `lookup_table` to the devices of its tokens: `[B, T, D]`, D unsharded."""
        columns, sequence = self.mesh_axes(name), self.mesh_axes("sequence")
        # One all-to-all for the axes that move to positions, one for the axes that move to rows, innermost axes first:
        # columns over (fsdp, expert, context) move context to positions, then (fsdp, expert) to rows. If all move at
        # once, the compiler uses an all-reduce of the whole array.
        for _, moved in itertools.groupby(reversed(columns), key=lambda axis: axis in sequence):
            columns = columns[: -len(list(moved))]
            x_BTD = jax.reshard(x_BTD, PartitionSpec(*(axes or None for axes in (*self._without(columns), columns))))
        return x_BTD

    def shard(self, x: jax.Array, *names: str | None, out_axis: str | None = None) -> jax.Array:
        """Reshards an activation to these logical axes.

        `out_axis` is the logical axis of the output features of the next projection. Over its mesh axes that also shard
        block positions, the activation is *reduced*: its gradient is then reduce-scattered.
        """
        reduced = frozenset(self.mesh_axes(out_axis)) & {*self.rules.block_sequence}
        return checkpoint_name(jax.reshard(x, self.spec(*names).update(reduced=reduced)), RESHARDED)

    def gather_sequence(self, x_BTD: jax.Array, out_axis: str) -> jax.Array:
        """All-gathers block positions before a projection whose output features are sharded by `out_axis`."""
        return self.shard(x_BTD, "batch", "sequence", None, out_axis=out_axis)

    def row_major(self, x: jax.Array) -> jax.Array:
        """Constrains an activation and its gradient to row-major layout, on TPUs."""
        # Otherwise the TPU compiler gives the residual stream the transposed layout of the weights, with slower copies
        # and norms.
        if self.platform != "tpu":
            return x
        return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))

    def map_local(self, fun: Callable[..., jax.Array], x: jax.Array, *weights: jax.Array) -> jax.Array:
        """Applies an elementwise `fun(x, *weights)` on each device to its own parts.

        Outside of this, JAX allows *reduced* weights only in matmuls. If the weights have a dimension over pipeline
        stages, `fun` gets the weights of the device's stage.
        """
        x_spec, *weight_specs = (jax.typeof(a).sharding.spec for a in (x, *weights))

        def on_device(x: jax.Array, *weights: jax.Array) -> jax.Array:
            return fun(x, *map(local_weight, weights, weight_specs))

        return jax.shard_map(on_device, in_specs=(x_spec, *weight_specs), out_specs=x_spec)(x, *weights)

    def with_reduced(self, spec: PartitionSpec, *axes: str) -> PartitionSpec:
        """Adds *reduced* axes to a sharding, so that the gradient stays a partial sum over `replica` and these axes."""
        return spec.update(reduced=frozenset(axis for axis in ("replica", *axes) if getattr(self.mesh, axis) > 1))


def axis_names(entry: SpecEntry) -> tuple[str, ...]:
    """Returns the mesh axes of one dimension of a `PartitionSpec` as a tuple."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def axes_by_dim(spec: PartitionSpec, ndim: int) -> list[tuple[str, ...]]:
    """Returns the mesh axes of each dimension; a `PartitionSpec` may leave out the last dimensions of an array."""
    return [axis_names(entry) for entry in (*spec.partitions, *[None] * (ndim - len(spec.partitions)))]


def local_shape(x: jax.Array) -> tuple[int, ...]:
    """Returns the shape of a device's part of an array; in a `shard_map` an array is the part."""
    # Not `sharding.shard_shape`, which JAX refuses in a `shard_map`.
    sharding = jax.typeof(x).sharding
    shards = (math.prod(sharding.mesh.shape[name] for name in axes) for axes in axes_by_dim(sharding.spec, x.ndim))
    return tuple(size // count for size, count in zip(x.shape, shards, strict=True))


def local_weight(w: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns a device's own weight inside a `shard_map`, without the dimension of stages.

    The gradient is a partial sum over the axes that the weight is *reduced* over.
    """
    w = jax.lax.pcast(w, tuple(spec.reduced), to="varying")
    return w[0] if has_stage_dim(spec) else w


def as_varying(x: jax.Array, spec: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """Makes the type of an array inside a `shard_map` vary over `axes`, also if they do not shard it."""
    x = jax.lax.pcast(x, tuple(spec.reduced), to="varying") if spec.reduced else x
    varying = spec.reduced.union(*(axis_names(entry) for entry in spec.partitions))
    replicated = tuple(axis for axis in axes if axis not in varying)
    return jax.lax.pcast(x, replicated, to="varying") if replicated else x


def has_stage_dim(spec: PartitionSpec) -> bool:
    """Returns whether the first dimension is sharded over pipeline stages."""
    return bool(spec.partitions) and "stage" in axis_names(spec.partitions[0])


def unit_cotangent(total: jax.Array) -> jax.Array:
    """Returns 1 as the cotangent of a scalar: that of an unreduced scalar must be *reduced* over the same axes."""
    return jnp.ones((), total.dtype, out_sharding=PartitionSpec(reduced=jax.typeof(total).sharding.spec.unreduced))


def unreduced_zeros(shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> jax.Array:
    """Returns zeros in a sharding that may be unreduced over mesh axes, as the start of a sum."""
    if shape:
        return jnp.zeros(shape, dtype, out_sharding=spec)
    # Without the barrier, the compiler merges this scalar with the constants of other zero arrays, which are unreduced
    # over other axes, and the TPU compiler then rejects the program.
    return jax.lax.broadcast(jax.lax.optimization_barrier(jnp.zeros((), dtype)), (), out_sharding=spec)
