"""Builds the device mesh: six named axes, ordered from the slowest links to the fastest.

The axes: `replica` (data parallel between slices, over the data-center network), `stage` (pipeline), `fsdp` (fully
sharded data parallel), `expert`, `context` (sequence), `tensor`. All six always exist; an axis of size 1 costs nothing.
Every axis has the type `Explicit`: the sharding of an array is part of its type, so a wrong sharding is an error when
JAX traces the function.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh_config import AXES, MeshConfig

type Device = Any
"""A JAX device; type checkers do not accept `jax.Device` as a type."""

_AXIS_TYPES = (AxisType.Explicit,) * len(AXES)


def make_mesh(config: MeshConfig, devices: Sequence[Device]) -> Mesh:
    """Builds the mesh over all of `devices`, with physical neighbors innermost.

    On TPUs `replica` spans the slices. Elsewhere devices are in the order of their ids, host after host, and any axis
    may span hosts.

    Raises:
        ConfigError: the sizes do not match the devices, or `replica` is not a multiple of the slices.
    """
    return Mesh(_arrange_devices(config.resolve(len(devices)), devices), AXES, axis_types=_AXIS_TYPES)


def _arrange_devices(config: MeshConfig, devices: Sequence[Device]) -> np.ndarray:
    """Returns the devices as an array with one dimension per mesh axis."""
    if any(device.platform != "tpu" for device in devices):
        # `jax.make_mesh` would treat every host as a slice here, and reject more than one host.
        in_order = np.array(sorted(devices, key=lambda device: device.id), dtype=object)
        return in_order.reshape(config.sizes)
    # Devices of a topology description have no `slice_index` if there is only one slice.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return _tpu_grid(mesh_utils.create_device_mesh, config.sizes, devices)
    if config.replica % slices:
        raise ConfigError(
            f"mesh.replica={config.replica}: must be a multiple of the {slices} slices; use mesh.replica={slices}"
        )
    sizes_in_slice = (config.replica // slices, *config.sizes[1:])
    # Of the six axes only `replica`, the first, crosses the data-center network (DCN).
    create = functools.partial(mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=(slices, 1, 1, 1, 1, 1))
    return _tpu_grid(create, sizes_in_slice, devices)


def _tpu_grid(create: Callable[..., np.ndarray], sizes: Sequence[int], devices: Sequence[Device]) -> np.ndarray:
    """Arranges devices with each mesh axis along whole dimensions of the network, if possible.

    `create` is one of the functions of JAX's `mesh_utils`.
    """
    if devices[0].device_kind in ("TPU v5 lite", "TPU v5e"):
        return create(sizes, devices=devices, allow_split_physical_axes=True)
    try:
        return create(sizes, devices=devices)
    except NotImplementedError:
        # An axis of size 8 does not fit whole dimensions of 4 x 4 x 4 chips, so two axes share a dimension. Devices are
        # then ordered row by row: with another order the compiler turns all-gathers over two axes into all-reduces.
        shared = create(sizes, devices=devices, allow_split_physical_axes=True)  # raises if no dimension can be shared
        return np.array(sorted(devices, key=_network_position), dtype=object).reshape(shared.shape)


def _network_position(device: Device) -> tuple[int, ...]:
    """Returns the slice, the coordinates of the chip in it, and the core: the order of `sorted` is row by row."""
    return (getattr(device, "slice_index", 0), *device.coords, device.core_on_chip)


def abstract_mesh(config: MeshConfig) -> AbstractMesh:
    """Builds the same mesh without devices, to trace and lower on; no axis may be -1."""
    assert -1 not in config.sizes, config
    return AbstractMesh(config.sizes, AXES, axis_types=_AXIS_TYPES)


def needs_unrolled_loops(mesh: Mesh | AbstractMesh) -> bool:
    """Returns whether loops whose steps communicate must be unrolled: on CPU devices that Gloo connects.

    It connects those of processes that have joined. XLA starts what follows a loop on CPU devices before the loop has
    ended, collectives too. Gloo pairs the collectives of different processes by their order alone: those of the loop
    would meet those that follow it, and Gloo would end the process. Without a loop XLA keeps the order of all.
    """
    if isinstance(mesh, AbstractMesh):
        return False
    return np.asarray(mesh.devices).flat[0].platform == "cpu" and jax.distributed.is_initialized()


def reshape_mesh(mesh: Mesh, config: MeshConfig) -> Mesh:
    """Returns a mesh of other sizes over the same devices, in the same order; no axis may be -1."""
    return Mesh(np.asarray(mesh.devices).reshape(config.sizes), AXES, axis_types=_AXIS_TYPES)


def permute_devices(mesh: Mesh, order: Sequence[int]) -> Mesh:
    """Returns the mesh with its devices in another order; in canonical mode results on it have the same bits."""
    grid = np.asarray(mesh.devices).reshape(-1)[list(order)].reshape(mesh.devices.shape)
    return Mesh(grid, mesh.axis_names, axis_types=mesh.axis_types)
