"""Mesh sizes match the devices; fast links are innermost, slices outermost."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.mesh import abstract_mesh, make_mesh, permute_devices
from jaxinfra.parallel.mesh_config import AXES, MeshConfig
from tests.refusals import problem, raises


@dataclass(frozen=True, kw_only=True)
class Chip:
    """The attributes of a device that `make_mesh` uses."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    process_index: int = 0
    core_on_chip: int = 0


# Two slices of 2 x 2 chips, and one of 2 x 2 x 2.
SLICES = [Chip(id=i, slice_index=i // 4, coords=(i % 2, i // 2 % 2, 0)) for i in range(8)]
BOX = [Chip(id=i, slice_index=0, coords=(i % 2, i // 2 % 2, i // 4), device_kind="TPU v5p") for i in range(8)]


def grid(config: MeshConfig, devices: list[Any]) -> np.ndarray:
    """Returns the devices of the mesh, `[replica, fsdp, tensor]`."""
    return make_mesh(config, devices).devices.squeeze((1, 3, 4))


def distance(one: Chip, other: Chip) -> int:
    """Returns the links between two chips of a slice, without wraparound."""
    return sum(abs(a - b) for a, b in zip(one.coords, other.coords, strict=True))


@pytest.mark.parametrize(
    ("config", "devices", "fsdp"),
    [
        (MeshConfig(), 8, 8),
        (MeshConfig(tensor=2), 8, 4),
        (MeshConfig(replica=2, tensor=4), 8, 1),
        (MeshConfig(fsdp=4, tensor=2), 8, 4),
        (MeshConfig(fsdp=1), 1, 1),
    ],
)
def test_the_free_axis_takes_the_remaining_devices(config: MeshConfig, devices: int, fsdp: int) -> None:
    resolved = config.resolve(devices)
    assert resolved.fsdp == fsdp
    assert math.prod(resolved.sizes) == devices
    assert resolved.resolve(devices) == resolved


def test_any_axis_may_be_the_free_one() -> None:
    assert MeshConfig(replica=-1, fsdp=2).resolve(8) == MeshConfig(replica=4, fsdp=2)


@pytest.mark.parametrize(
    ("config", "devices", "named"),
    [
        (MeshConfig(fsdp=4), 8, "mesh.fsdp=4: 8 cpu:4 mesh.fsdp=-1"),
        (
            MeshConfig(replica=2, fsdp=2, tensor=2),
            4,
            "mesh.replica=2, mesh.fsdp=2, mesh.tensor=2: 4 cpu:8 mesh.fsdp=-1",
        ),
        (MeshConfig(fsdp=1), 2, "mesh: 2 cpu:1 mesh.fsdp=-1"),
        (MeshConfig(fsdp=2, tensor=3), 8, "mesh.fsdp=2, mesh.tensor=3: 8 cpu:6"),
        (MeshConfig(tensor=3), 8, "mesh.fsdp=-1, mesh.tensor=3: 8"),
    ],
)
def test_sizes_that_do_not_match_the_devices_are_refused(config: MeshConfig, devices: int, named: str) -> None:
    with raises(ConfigError, named) as caught:
        config.resolve(devices)
    if "mesh.fsdp=-1 to use" in str(caught.value):
        replace(config, fsdp=-1).resolve(devices)


def test_invalid_sizes_are_problems() -> None:
    """Also after the mesh was sized for devices, which comes first in a start."""
    wrong_type = replace(MeshConfig(), **{"fsdp": "all"})
    for config, named in (
        (MeshConfig(replica=-1), "replica=-1, fsdp=-1:"),
        (MeshConfig(tensor=0), "tensor=0: tensor=1"),
        (MeshConfig(fsdp=0), "fsdp=0: fsdp=-1"),
        (MeshConfig(fsdp=-2, replica=-2), "replica=-2: replica=1"),
        (wrong_type, "fsdp=all: int"),
    ):
        problem(config, named)
        problem(config.resolve(8), named)


def test_axes_are_in_order_and_explicit() -> None:
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2), jax.devices())
    assert mesh.axis_names == AXES == ("replica", "stage", "fsdp", "expert", "context", "tensor")
    assert mesh.axis_types == (AxisType.Explicit,) * 6
    assert [device.id for device in mesh.devices.flat] == [device.id for device in jax.devices()]
    abstract = abstract_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    assert (abstract.shape, abstract.axis_types) == (mesh.shape, mesh.axis_types)


@pytest.mark.parametrize("config", [MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=2, fsdp=2, tensor=2)])
def test_the_innermost_axis_joins_neighbors(config: MeshConfig) -> None:
    for pair in grid(config, BOX).reshape(-1, 2):
        assert distance(*pair) == 1


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(replica=2, fsdp=2, tensor=2),
        MeshConfig(replica=2, fsdp=4),
        MeshConfig(replica=4, fsdp=2),
        MeshConfig(replica=4, fsdp=1, tensor=2),
        MeshConfig(replica=-1, fsdp=1),
    ],
)
def test_only_replica_spans_slices(config: MeshConfig) -> None:
    """The first half of the replicas is one slice, in any order of the devices."""
    shuffled = [SLICES[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
    for devices in (SLICES, shuffled):
        halves = np.split(grid(config, devices), 2)
        assert [{chip.slice_index for chip in half.flat} for half in halves] == [{0}, {1}]
        assert {chip.id for half in halves for chip in half.flat} == set(range(8))


@pytest.mark.parametrize("config", [MeshConfig(fsdp=8), MeshConfig(), MeshConfig(fsdp=4, tensor=2)])
def test_other_axes_may_not_span_slices(config: MeshConfig) -> None:
    with raises(ConfigError, "mesh.replica=1: use mesh.replica=2"):
        make_mesh(config, SLICES)


@pytest.mark.parametrize(("platform", "kind"), [("gpu", "NVIDIA H100"), ("cpu", "cpu")])
def test_any_axis_may_span_hosts_without_slices(platform: str, kind: str) -> None:
    """Off TPUs JAX calls a host a slice; the innermost axis still stays inside one."""
    hosts = [replace(chip, platform=platform, device_kind=kind) for chip in SLICES]
    devices = grid(MeshConfig(fsdp=4, tensor=2), [hosts[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)])
    assert [device.id for device in devices.flat] == list(range(8))


def test_permute_devices_changes_only_the_order() -> None:
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, tensor=2), jax.devices())
    order = (5, 2, 7, 0, 3, 6, 1, 4)
    other = permute_devices(mesh, order)
    assert tuple(device.id for device in other.devices.flat) == order
    assert (other.shape, other.axis_types) == (mesh.shape, mesh.axis_types)


def test_an_axis_may_use_part_of_a_network_dimension() -> None:
    """An axis of 4 on rows of 16 chips: each group is consecutive chips of a row."""
    square = [Chip(id=i, slice_index=0, coords=(i % 16, i // 16, 0), device_kind="TPU v6 lite") for i in range(256)]
    found = grid(MeshConfig(fsdp=64, tensor=4), square).reshape(64, 4)
    assert {chip.id for chip in found.flat} == set(range(256))
    for group in found:
        assert max(distance(one, other) for one in group for other in group) == 3


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v4"])
def test_axes_that_share_a_network_dimension_are_row_major(kind: str) -> None:
    """8 x 8 on 4 x 4 x 4 chips: both axes together are in the order of the network."""
    cube = [Chip(id=i, slice_index=0, coords=(i % 4, i // 4 % 4, i // 16), device_kind=kind) for i in range(64)]
    found = make_mesh(MeshConfig(fsdp=8, context=8), cube).devices.reshape(-1)
    assert [chip.coords for chip in found] == sorted(chip.coords for chip in cube)
