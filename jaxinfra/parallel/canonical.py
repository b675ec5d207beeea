"""Canonical mode: sums of a batch whose bits do not depend on the mesh.

The rows of a global batch are split into a fixed number of *virtual shards*, in order. The devices of all mesh axes
share them: each applies the whole model to its virtual shards, one after another, so the shapes of all operations are
the same on every mesh. The sums and gradients of the virtual shards are added along one binary tree, neighbors first:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

A device has a subtree, which it adds by itself; an all-to-all brings each device its part of all the subtrees' sums,
and it adds them in order. So an ordered sum sends no more bytes than a reduce-scatter.

Sums of squares of sharded arrays, for the gradient's norm, are added along a tree that does not depend on the mesh
either. Every addition here is of whole arrays, elementwise: no reduction is left to the compiler, whose order depends
on shapes.

All of it runs in a `shard_map` over all mesh axes; devices are counted in the order of `AXES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.parallel.bits import digest
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from jaxinfra.parallel.rounding import rounded, unknown_zero
from jaxinfra.parallel.sharding import axes_by_dim, axis_names
from jaxinfra.parallel.spec import Batch, PyTree

DIGESTS = ("weights", "shards", "sums", "parts")
"""Names of the digests of `VirtualShards.gradients` (`bits.digest`), in the order of the computation: of the weights
that each device has gathered, of the result of each virtual shard, of each device's sum, of its part of all sums."""


@dataclass(frozen=True, kw_only=True)
class VirtualShards:
    """The virtual shards of a batch on one mesh.

    Attributes:
        count: number of virtual shards, a power of two.
        mesh: sizes of the mesh axes; their product divides `count`.
    """

    count: int
    mesh: MeshConfig

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The mesh axes with more than one device."""
        return tuple(axis for axis in AXES if self.mesh.shards(axis) > 1)

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.sizes)

    @property
    def per_device(self) -> int:
        """Number of virtual shards of one device."""
        return self.count // self.devices

    @property
    def rows(self) -> PartitionSpec:
        """The sharding of a batch: rows over all mesh axes."""
        return PartitionSpec(self.axes or None)

    def gradients(
        self,
        fun: Callable[..., tuple[PyTree, PyTree]],
        weights: PyTree,
        stored: PyTree,
        batch: Batch,
        out: PyTree,
        *,
        with_digests: bool = False,
    ) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
        """Adds what `fun(weights, batch) -> (sums, gradients)` returns for each virtual shard.

        Also returns `DIGESTS` of what was computed on the way, by name, if they are asked for.

        Args:
            fun: computes a virtual shard on one device; it cannot use mesh axes.
            weights: sharded arrays; `fun` gets them all-gathered.
            stored: the `PartitionSpec`s of the weights.
            batch: arrays with the sharding `rows`.
            out: the `PartitionSpec`s in which the gradients are returned.
            with_digests: whether to return digests.
        """

        def on_device(weights: PyTree, batch: Batch) -> tuple[PyTree, PyTree, dict[str, jax.Array]]:
            whole = jax.tree.map(_gather, weights, stored)
            own, shards = self._sum_own(fun, whole, batch, with_digests=with_digests)
            sums, grads = jax.tree.map(self._sum_devices, own[0]), jax.tree.map(self._sum_and_scatter, own[1], out)
            if not with_digests:
                return sums, grads, {}
            of_device = digest(whole), shards, digest(own), digest((sums, grads))
            gathered = (jax.lax.all_gather(each, self.axes, tiled=True) if self.axes else each for each in of_device)
            return sums, grads, dict(zip(DIGESTS, gathered, strict=True))

        return self._map(on_device, (stored, self.rows), (PartitionSpec(), out, PartitionSpec()))(weights, batch)

    def sums(self, fun: Callable[..., PyTree], weights: PyTree, stored: PyTree, batch: Batch) -> PyTree:
        """Adds what `fun(weights, batch) -> sums` returns for each virtual shard; arguments as in `gradients`."""
        return self.gradients(lambda weights, batch: (fun(weights, batch), ()), weights, stored, batch, ())[0]

    def make(self, fun: Callable[[jax.Array], PyTree], key: jax.Array, out: PyTree) -> PyTree:
        """Returns the arrays that `fun(key)` makes, in the `PartitionSpec`s `out`; each device makes whole arrays."""

        def on_device(key: jax.Array) -> PyTree:
            # Without the barrier the compiler may make a device's part alone, with other bits at the end of a vector.
            return jax.tree.map(self._own_part, jax.lax.optimization_barrier(fun(key)), out)

        return self._map(on_device, PartitionSpec(), out)(key)

    def square_sum(self, arrays: PyTree, stored: PyTree) -> jax.Array:
        """Adds the squares of all elements of arrays with the `PartitionSpec`s `stored`, in float32."""
        specs = jax.tree.leaves(stored)

        def on_device(*arrays: jax.Array) -> jax.Array:
            zero = _zero_of(arrays)
            squares = [rounded(jnp.square(x.astype(jnp.float32)), zero) for x in arrays]
            blocks = [self._sums_of_blocks(x, spec) for x, spec in zip(squares, specs, strict=True)]
            # Each sum comes from one device, all others add zeros: the order has no effect.
            total = jax.lax.psum(jnp.concatenate(blocks), self.axes) if self.axes else jnp.concatenate(blocks)
            return _sum_halves(total)

        return self._map(on_device, tuple(specs), PartitionSpec())(*jax.tree.leaves(arrays))

    def _map[R](self, fun: Callable[..., R], in_specs: PyTree, out_specs: PyTree) -> Callable[..., R]:
        # `check_vma` is off, as models here do not declare over which mesh axes their values vary.
        return jax.shard_map(fun, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    # On one device, in a `shard_map`

    def _sum_own(
        self, fun: Callable[[PyTree, Batch], PyTree], weights: PyTree, batch: Batch, *, with_digests: bool
    ) -> tuple[PyTree, PyTree]:
        """Adds what `fun` returns for each virtual shard of this device; also returns its digests: [virtual shards]."""
        zero = _zero_of(weights)

        def add(batch: Batch, count: int) -> tuple[PyTree, PyTree]:
            """Adds `count` virtual shards: the two halves of the batch, each of which is added in the same way."""
            if count == 1:
                # The barriers keep the compiler from merging a virtual shard with what comes before and after it, which
                # differs between meshes.
                found = jax.lax.optimization_barrier(fun(*jax.lax.optimization_barrier((weights, batch))))
                found = jax.tree.map(lambda x: rounded(x, zero), found)
                return found, digest(found) if with_digests else ()
            halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
            half = partial(add, count=count // 2)
            shapes, _ = jax.eval_shape(half, jax.tree.map(lambda x: x[0], halves))

            def step(total: PyTree, xs: tuple[jax.Array, Batch]) -> tuple[PyTree, PyTree]:
                is_first, batch = xs
                found, digests = half(batch)
                # Not `zeros + first`, which would change the sign of a zero.
                return jax.tree.map(lambda t, x: jnp.where(is_first, x, t + x), total, found), digests

            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            total, digests = jax.lax.scan(step, zeros, (jnp.array([True, False]), halves))
            return total, jax.tree.map(lambda x: x.reshape(-1), digests)

        return add(batch, self.per_device)

    def _sum_devices(self, x: jax.Array) -> jax.Array:
        """Adds an array over all devices; each gets the sum."""
        return _sum_neighbors(jax.lax.all_gather(x, self.axes)) if self.axes else x

    def _sum_and_scatter(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Adds a whole array over all devices; each gets its part in the sharding `spec`.

        `f32[D@fsdp, F]` on a mesh of replica=2 and fsdp=4 is cut into 4 parts, and each of them into 2 for the
        replicas, which send each other their halves of the sum.
        """
        if not self.axes:
            return x
        shards = self.mesh.shards
        entries = axes_by_dim(spec, x.ndim)
        local_shape = [size // shards(*axes) for size, axes in zip(x.shape, entries, strict=True)]
        sharded = [axis for axes in entries for axis in axes]
        replicas = [axis for axis in self.axes if axis not in sharded]
        # Splits each dimension into one for each of its mesh axes and one for a device's part: fsdp, D / fsdp, F. Then
        # moves those of the mesh axes to the front.
        split, local_dims = [], []
        for axes, size in zip(entries, local_shape, strict=True):
            split += [*map(shards, axes), size]
            local_dims.append(len(split) - 1)
        order = [*(dim for dim in range(len(split)) if dim not in local_dims), *local_dims]
        parts = x.reshape(split).transpose(order).reshape(*map(shards, sharded), -1)
        copies, length = shards(*replicas), math.prod(local_shape)
        parts = jnp.pad(parts, [(0, 0)] * len(sharded) + [(0, -length % copies)])
        parts = parts.reshape(*map(shards, sharded), *map(shards, replicas), -1)
        by_axis = [[*sharded, *replicas].index(axis) for axis in self.axes]  # from mesh axes to the order of devices
        parts = parts.transpose(*by_axis, parts.ndim - 1).reshape(self.devices, -1)
        own = _sum_neighbors(jax.lax.all_to_all(parts, self.axes, split_axis=0, concat_axis=0, tiled=True))
        if replicas:
            own = jax.lax.all_gather(own, tuple(replicas), tiled=True)[:length]
        return own.reshape(local_shape)

    def _own_part(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Returns this device's part of a whole array."""
        for dim, entry in enumerate(spec.partitions):
            if axes := axis_names(entry):
                size = x.shape[dim] // self.mesh.shards(*axes)
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis=dim)
        return x

    def _sums_of_blocks(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Returns the sum of each block of an array, flat; zeros for blocks of other devices.

        Each dimension is split into as many blocks as `count` allows, whatever its sharding is.
        """
        entries = axes_by_dim(spec, x.ndim)
        shards = [self.mesh.shards(*axes) for axes in entries]
        # The blocks along each dimension of the whole array, and of the device's part.
        blocks = [math.gcd(n * count, self.count) for n, count in zip(x.shape, shards, strict=True)]
        own = [count // shard for count, shard in zip(blocks, shards, strict=True)]
        split = [size for n, count in zip(x.shape, own, strict=True) for size in (count, n // count)]
        order = (*range(0, len(split), 2), *range(1, len(split), 2))  # blocks first, then what is in a block
        inner = x.reshape(split).transpose(order).reshape(math.prod(own), -1)
        sums = _sum_halves(inner.T).reshape(own)
        replicas = tuple(axis for axis in self.axes if all(axis not in axes for axes in entries))
        if replicas:
            sums = jnp.where(jax.lax.axis_index(replicas) == 0, sums, 0)
        start = [jax.lax.axis_index(axes) * n if axes else 0 for axes, n in zip(entries, own, strict=True)]
        return jax.lax.dynamic_update_slice(jnp.zeros(blocks, jnp.float32), sums, start).reshape(-1)


def _zero_of(arrays: PyTree) -> jax.Array:
    """Returns a 0 that the compiler does not know (see `rounding`)."""
    floating = (x for x in jax.tree.leaves(arrays) if jnp.issubdtype(x.dtype, jnp.floating))
    return unknown_zero(next(floating).reshape(-1)[0])


def _gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Returns the whole array of a device's part."""
    for dim, entry in enumerate(spec.partitions):
        if axes := axis_names(entry):
            x = jax.lax.all_gather(x, axes, axis=dim, tiled=True)
    return x


def _sum_neighbors(x: jax.Array) -> jax.Array:
    """Adds along the first dimension, whose size is a power of two: `(0 + 1) + (2 + 3)`."""
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


def _sum_halves(x: jax.Array) -> jax.Array:
    """Adds along the first dimension: `(0 + 2) + (1 + 3)`, with zeros in place of what is missing."""
    while len(x) > 1:
        half = -(-len(x) // 2)
        x = x[:half] + jnp.pad(x[half:], [(0, 2 * half - len(x)), *[(0, 0)] * (x.ndim - 1)])
    return x[0]
