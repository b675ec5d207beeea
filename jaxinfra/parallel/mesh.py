"""The device mesh: six named axes over the devices, the fastest links innermost.

The axes, from the slowest links to the fastest: `replica` (data parallel between slices, over the data-centre
network), `stage` (pipeline), `fsdp` (fully sharded data parallel), `expert`, `context` (sequence), `tensor`.
All six are always there; an axis of size 1 costs nothing. Every axis is of the `Explicit` type: the sharding of
an array is part of its type, and a mistake is an error while tracing, not a slow program.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh_config import AXES, MeshConfig

type Device = Any
"""A JAX device, whose class has no public type."""


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


def permute_devices(mesh: Mesh, order: Sequence[int]) -> Mesh:
    """The mesh with its devices in another order: the numbers that it computes must not change."""
    grid = np.asarray(mesh.devices).reshape(-1)[list(order)].reshape(mesh.devices.shape)
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
