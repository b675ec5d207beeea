"""The device mesh: six named axes over the devices, the fastest links innermost.

The axes, from the slowest links to the fastest: `replica` (data parallel between slices, over the data-centre
network), `stage` (pipeline), `fsdp` (fully sharded data parallel), `expert`, `context` (sequence), `tensor`.
All six are always there; an axis of size 1 costs nothing. Every axis is of the `Explicit` type: the sharding of
an array is part of its type, and a mistake is an error while tracing, not a slow program.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfra.config import Problem
from jaxinfra.config.limits import Count
from jaxinfra.errors import ConfigError

type Device = Any
"""A JAX device, whose class has no public type."""

type MeshAxis = Literal["replica", "stage", "fsdp", "expert", "context", "tensor"]
type AxisSize = Literal[-1] | Count


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The size of every mesh axis; at most one may be -1, which takes the devices that are left.

    Attributes:
        replica: copies of the parameters, one a slice where there are several; gradients meet once a step.
        stage: pipeline stages.
        fsdp: data parallel with parameters, gradients and optimiser state sharded.
        expert: data parallel, with the experts of a layer shared out; all other parameters are sharded as over fsdp.
        context: shards of a sequence.
        tensor: shards of heads, MLP width and vocabulary.
    """

    replica: AxisSize = 1
    stage: AxisSize = 1
    fsdp: AxisSize = -1
    expert: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1

    def problems(self) -> Iterable[Problem]:
        """At most one size is -1."""
        if len(free := self._free) > 1:
            yield Problem(fields=free, message="only one mesh axis may be -1", fix=f"give {free[0]} a size")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of `AXES`."""
        return astuple(self)

    @property
    def _free(self) -> tuple[str, ...]:
        return tuple(axis for axis, size in zip(AXES, self.sizes, strict=True) if size == -1)

    def resolve(self, devices: int) -> "MeshConfig":
        """The same mesh with -1 replaced, for `devices` devices; a ConfigError where the sizes multiply to others."""
        named = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size != 1)
        fixed = math.prod(size for size in self.sizes if size != -1)
        free = self._free[:1]
        fits = devices % fixed == 0 if free else devices == fixed
        if fits:
            return replace(self, **{axis: devices // fixed for axis in free})
        fix = f"use --devices cpu:{fixed} to emulate them, or mesh.fsdp=-1 to take what is there"
        if free:
            fix = f"the other axes must divide {devices}"
        raise ConfigError(f"{named or 'mesh'}: asks for {fixed} devices, {devices} here; {fix}")


AXES: tuple[str, ...] = tuple(field.name for field in fields(MeshConfig))


def make_mesh(config: MeshConfig, devices: Sequence[Device]) -> Mesh:
    """A mesh of `config` over all of `devices`, explicit axis types, physical neighbors innermost.

    On TPUs several slices make the outermost axis: `replica` must be a multiple of their number. Elsewhere
    devices stand in the order of their ids, host after host, and any axis may span hosts. Sizes that do not fit the
    devices, or a `replica` that does not fit the slices, are a ConfigError.
    """
    config = config.resolve(len(devices))
    mesh = functools.partial(Mesh, axis_names=AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    if any(device.platform != "tpu" for device in devices):
        # Not by `jax.make_mesh`: off TPUs it takes every host for a slice and refuses more than one.
        in_order = np.array(sorted(devices, key=lambda device: device.id), dtype=object)
        return mesh(in_order.reshape(config.sizes))
    # The devices of a described topology have a slice only where it has several.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh(_split_where_needed(mesh_utils.create_device_mesh, config.sizes, devices))
    if config.replica % slices:
        raise ConfigError(
            f"mesh.replica={config.replica}: {slices} slices need a multiple of {slices}; use mesh.replica={slices}"
        )
    inside = (config.replica // slices, *config.sizes[1:])
    hybrid = functools.partial(mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=(slices, 1, 1, 1, 1, 1))
    return mesh(_split_where_needed(hybrid, inside, devices))


def _split_where_needed(create: Callable[..., np.ndarray], sizes: Sequence[int], devices: Sequence[Device]):
    """Devices in a grid, each mesh axis along whole dimensions of the chips' network where that can be.

    Where it cannot (an axis of 8 on 4 x 4 x 4 chips), axes share a dimension, and the grid is the network row by row:
    then what lies together in the mesh lies together in it, over several axes at once too. In any other order the
    compiler makes an all-reduce of every all-gather over two of them. On v5e all is as `jax.make_mesh` does it.
    """
    if devices[0].device_kind in ("TPU v5 lite", "TPU v5e"):
        return create(sizes, devices=devices, allow_split_physical_axes=True)
    try:
        return create(sizes, devices=devices)
    except NotImplementedError:  # raised by JAX for an axis that cannot lie along whole dimensions: axes share one then
        shared = create(sizes, devices=devices, allow_split_physical_axes=True)  # refuses what cannot be shared
        return np.array(sorted(devices, key=_place), dtype=object).reshape(shared.shape)


def _place(device: Device) -> tuple[int, ...]:
    """Where a TPU device is: its slice, the chip's place in it, and its place on the chip."""
    return (getattr(device, "slice_index", 0), *device.coords, device.core_on_chip)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """The same mesh without devices, to trace and lower on. No axis may be -1."""
    assert -1 not in config.sizes, config
    return AbstractMesh(config.sizes, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def permuted(mesh: Mesh, order: Sequence[int]) -> Mesh:
    """The mesh with its devices in another order: the numbers that it computes must not change."""
    grid = np.asarray(mesh.devices).reshape(-1)[list(order)].reshape(mesh.devices.shape)
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
