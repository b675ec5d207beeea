"""ShardingRules from logical axes to mesh axes, and the movements of arrays that follow from them.

A model names the dimensions of its arrays ("batch", "embed", "heads", ...); `ShardingRules` maps each
name to mesh axes; `Partitioner` turns names into shardings. To try another sharding, change one field of the rules.

How an array's type reads here (JAX explicit sharding): a weight *stored* as `f32[D@fsdp, F@tensor]` is *used* as
`f32[D, F@tensor]{R: replica, fsdp, context}`: gathered over `fsdp`, and marked as reduced over every axis that
the activations which it meets are spread over. The mark makes its gradient a partial sum (unreduced) over those
axes: it is scattered over `fsdp` at once and crosses `replica` only where the train step says so.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout as Stored
from jax.experimental.layout import with_layout_constraint
from jax.sharding import PartitionSpec

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.context import SequenceSharding
from jaxinfra.parallel.mesh_config import MeshConfig
from jaxinfra.parallel.rules import LogicalAxes, Quantize, ShardingRules
from jaxinfra.parallel.spec import ParamSpec

GATHERED_WEIGHT = "gathered"
"""The name by which rematerialisation knows a weight that was gathered: no layer keeps it for its backward pass."""

RESHARDED = "moved"
"""The name of an activation that was moved to another sharding."""

STAGES = "stages"
"""The logical axis of weights of several pipeline stages, one layer of each, side by side."""


@dataclass(frozen=True, kw_only=True)
class Partitioner:
    """Shardings by name, for one model on one mesh.

    Attributes:
        rules: logical axis to mesh axes.
        mesh: size of every mesh axis, none of them -1.
        platform: what runs the program ("cpu", "gpu", "tpu"): kernels are chosen by it.
        compute_dtype: the dtype that weights are cast to where they are used.
        quantize: the format of the factors of products with the weights of layers.
        zigzag: sequences that are spread over devices stand in zig-zag order there.
    """

    rules: ShardingRules = ShardingRules()
    mesh: MeshConfig = MeshConfig(fsdp=1)
    platform: str = "cpu"
    compute_dtype: jnp.dtype = jnp.dtype("float32")
    quantize: Quantize = "none"
    zigzag: bool = False

    @property
    def sequence_sharding(self) -> SequenceSharding:
        """Which positions of a sequence each of its shards has."""
        return SequenceSharding(
            axes=self.mesh_axes("sequence"), num_shards=self.num_shards("sequence"), zigzag=self.zigzag
        )

    def _real(self, axes: Iterable[str]) -> tuple[str, ...]:
        """Those of the mesh axes that have more than one device: others never appear in a type."""
        return tuple(axis for axis in axes if getattr(self.mesh, axis) > 1)

    def mesh_axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes, of more than one device, of a logical axis (see `ShardingRules.mesh_axes`)."""
        return () if name is None else self._real(("stage",) if name == STAGES else self.rules.mesh_axes(name))

    def num_shards(self, name: str | None) -> int:
        """How many shards a logical axis is cut into."""
        return math.prod(getattr(self.mesh, axis) for axis in self.mesh_axes(name))

    def spec(self, *names: str | None) -> PartitionSpec:
        """The sharding of an array whose dimensions have these logical axes."""
        return PartitionSpec(*(self.mesh_axes(name) or None for name in names))

    def _axes(self, name: str | None, names: LogicalAxes) -> tuple[str, ...]:
        """The mesh axes of a parameter's dimension: the width leaves the axes of experts to them."""
        taken = self.mesh_axes("experts") if name == "embed" and "experts" in names else ()
        return tuple(axis for axis in self.mesh_axes(name) if axis not in taken)

    def stored_spec(self, path: str, spec: ParamSpec) -> PartitionSpec:
        """The sharding in which a parameter is kept.

        Pipeline stages share out stacked layers where they divide them, and the width of all other parameters: of
        these no stage keeps the whole either. A ConfigError where two dimensions want one mesh axis, or do not divide.
        """
        axes = [self._axes(name, spec.axes) for name in spec.axes]
        if "layers" in spec.axes and spec.shape[spec.axes.index("layers")] % self.num_shards("layers"):
            axes[spec.axes.index("layers")] = ()
        if "embed" in spec.axes and self.mesh.stage > 1 and not any("stage" in one for one in axes):
            at = spec.axes.index("embed")
            if spec.shape[at] % (self.num_shards("embed") * self.mesh.stage) == 0:
                axes[at] = (*axes[at], "stage")
        seen: dict[str, str | None] = {}
        for size, name, spread in zip(spec.shape, spec.axes, axes, strict=True):
            for axis in spread:
                if axis in seen:
                    raise ConfigError(
                        f"rules.{name}, rules.{seen[axis]}: both put a dimension of parameter {path} "
                        f"{spec.shape} on mesh axis {axis}; take it from one of them"
                    )
                seen[axis] = name
            if size % math.prod(getattr(self.mesh, axis) for axis in spread):
                raise ConfigError(
                    f"rules.{name}={self.mesh_axes(name)}: parameter {path} {spec.shape} has {size} {name}, which "
                    f"{self.num_shards(name)} shards do not divide; use another mesh or rules.{name}=()"
                )
        return PartitionSpec(*(spread or None for spread in axes))

    def _compute_spec(self, names: LogicalAxes, activation_axes: LogicalAxes) -> PartitionSpec:
        """The sharding in which a weight meets an activation whose spread dimensions are `activation_axes`."""
        over = [axis for name in activation_axes for axis in self.mesh_axes(name)]
        if names[:1] == (STAGES,):
            over = [axis for axis in over if axis != "stage"]  # each stage's rows meet the weights of that stage
        if "experts" in names:
            over = [axis for axis in over if axis not in self.mesh_axes("experts")]  # tokens are sent to their experts
        kept = [tuple(axis for axis in self._axes(name, names) if axis not in over) or None for name in names]
        return PartitionSpec(*kept, reduced=frozenset(over))

    def gather_weight(
        self,
        value: jax.Array,
        names: LogicalAxes,
        activation_axes: LogicalAxes = ("batch", "sequence"),
        dtype: jnp.dtype | None = None,
    ) -> jax.Array:
        """A stored weight made ready for use: cast to the compute dtype, gathered, marked as reduced.

        Args:
            value: the parameter, or one layer of it.
            names: its logical axes, of one layer; a `value` of one more dimension has a layer of each stage.
            activation_axes: the spread dimensions of the activation that it is used with.
            dtype: another dtype than that of the partitioner.
        """
        if value.ndim > len(names):
            names = (STAGES, *names)
        value = value.astype(dtype or self.compute_dtype)
        return checkpoint_name(jax.reshard(value, self._compute_spec(names, activation_axes)), GATHERED_WEIGHT)

    def lookup_table(self, table: jax.Array, name: str) -> tuple[jax.Array, PartitionSpec]:
        """A table ready for lookups in its own columns, and the sharding `[B, T, columns]` of what they yield.

        Its rows are whole; its columns, of the logical axis `name`, stay where they are stored.
        """
        kept = self.mesh_axes(name)
        spread = (self.mesh_axes("batch"), self.mesh_axes("sequence"))
        batch, sequence = (tuple(axis for axis in axes if axis not in kept) for axes in spread)
        used = PartitionSpec(None, kept or None, reduced=frozenset((*batch, *sequence)))
        yielded = PartitionSpec(batch or None, sequence or None, kept or None)
        return jax.reshard(table.astype(self.compute_dtype), used), yielded

    def reshard_to_tokens(self, x_BTD: jax.Array, name: str) -> jax.Array:
        """Moves the result of a lookup in `lookup_table` to the devices of its tokens: `[B, T, D]`, columns whole.

        Axes that go to positions and axes that go to rows move one after the other, the innermost first: each time
        it is an all-to-all. Of all at once the compiler makes an all-reduce of the whole array, on every device.
        """
        kept = self.mesh_axes(name)
        batch, sequence = self.mesh_axes("batch"), self.mesh_axes("sequence")
        while kept:
            to_sequence = kept[-1] in sequence
            while kept and (kept[-1] in sequence) == to_sequence:
                kept = kept[:-1]
            spread = (tuple(axis for axis in axes if axis not in kept) for axes in (batch, sequence))
            x_BTD = jax.reshard(x_BTD, PartitionSpec(*(axes or None for axes in (*spread, kept))))
        return x_BTD

    def shard(self, x: jax.Array, *names: str | None, out_axis: str | None = None) -> jax.Array:
        """An activation moved to the sharding of these logical axes.

        `out_axis` is the logical axis of the output features of the projection that follows. The activation is marked
        as reduced over its mesh axes that also shard block positions: its gradient is then reduce-scattered.
        """
        reduced = frozenset(self.mesh_axes(out_axis)) & {*self.rules.block_sequence}
        return checkpoint_name(jax.reshard(x, self.spec(*names).update(reduced=reduced)), RESHARDED)

    def row_major(self, x: jax.Array) -> jax.Array:
        """An activation stored row by row, features next to one another, its gradient too.

        Said for TPUs alone: left to itself their compiler lets a stream of activations follow the weights that add to
        it, which it stores transposed, and copies and norms then cost more.
        """
        if self.platform != "tpu":
            return x
        return with_layout_constraint(x, Stored(major_to_minor=tuple(range(x.ndim))))

    def gather_sequence(self, x_BTD: jax.Array, out_axis: str) -> jax.Array:
        """A stream of block positions with whole positions, for products with weights of these features."""
        return self.shard(x_BTD, "batch", "sequence", None, out_axis=out_axis)

    def map_local(self, fun: Callable[..., jax.Array], x: jax.Array, *weights: jax.Array) -> jax.Array:
        """`fun(x, *weights)` where every device works on its own part of `x` and of the ready weights.

        For elementwise work: outside such a region JAX lets reduced weights into matrix products alone. Of weights
        of several stages `fun` sees those of the device's own stage.
        """
        x_spec, *weight_specs = (jax.typeof(a).sharding.spec for a in (x, *weights))

        def on_device(x: jax.Array, *weights: jax.Array) -> jax.Array:
            return fun(x, *map(local_weight, weights, weight_specs))

        return jax.shard_map(on_device, in_specs=(x_spec, *weight_specs), out_specs=x_spec)(x, *weights)

    def with_reduced(self, spec: PartitionSpec, *axes: str) -> PartitionSpec:
        """A parameter's sharding marked so that its gradient stays a partial sum over `replica` and these axes."""
        return spec.update(reduced=frozenset(self._real(("replica", *axes))))


def axis_names(part: Any) -> tuple[str, ...]:
    """The mesh axes that a dimension is spread over, from its part of a sharding."""
    return part if isinstance(part, tuple) else () if part is None else (part,)


def local_weight(w: jax.Array, spec: PartitionSpec) -> jax.Array:
    """In a `shard_map`: a ready weight of this sharding as one value a device, without a dimension of stages.

    Its gradient becomes a partial sum of theirs over the axes that it is reduced over.
    """
    w = jax.lax.pcast(w, tuple(spec.reduced), to="varying")
    return w[0] if has_stage_dim(spec) else w


def as_varying(x: jax.Array, spec: PartitionSpec, axes: tuple[str, ...]) -> jax.Array:
    """In a `shard_map`: an array of this sharding as a value of each device along `axes`, spread over them or not."""
    there = {axis for part in spec.partitions for axis in axis_names(part)}
    x = jax.lax.pcast(x, tuple(spec.reduced), to="varying") if spec.reduced else x
    alike = tuple(axis for axis in axes if axis not in there | spec.reduced)
    return jax.lax.pcast(x, alike, to="varying") if alike else x


def has_stage_dim(spec: PartitionSpec) -> bool:
    """Whether an array of this sharding has a leading dimension of pipeline stages."""
    return bool(spec.partitions) and "stage" in axis_names(spec.partitions[0])


def unreduced_zeros(shape: tuple[int, ...], dtype: jnp.dtype, spec: PartitionSpec) -> jax.Array:
    """Zeros that are a partial sum (unreduced) over mesh axes, for others to be added to.

    A scalar is kept apart from other constants. A scalar constant that is itself unreduced is merged with the zeros
    that arrays are made from, which are unreduced over other axes, and the TPU compiler refuses the program.
    """
    if shape:
        return jnp.zeros(shape, dtype, out_sharding=spec)
    return jax.lax.broadcast(jax.lax.optimization_barrier(jnp.zeros((), dtype)), (), out_sharding=spec)
