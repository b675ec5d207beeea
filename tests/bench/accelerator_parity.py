"""`bench accelerator --only parity`: loss and gradients of one device against the CPU, and of meshes against it.

The differences are relative to the largest value of each array; all is float32 with exact matmuls.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial

import jax

from jaxinfra import MeshConfig
from jaxinfra.parallel.mesh import Device
from jaxinfra.parallel.mesh_config import AXES
from jaxinfra.parity import PARITY_CONFIGS
from jaxinfra.parity.meshes import (
    TOLERANCE,
    Arrays,
    batch_gradients,
    compare_mesh,
    load_on_mesh,
    mesh_difference,
    mesh_name,
    relative_differences,
)
from tests.bench.accelerator_timing import Case, Part, Setting, unmeasured
from tests.bench.table import Columns, TableRow

COLUMNS: Columns = {
    "loss": ("loss", "{:.1e}"),
    "gradient": ("gradient", "{:.1e}"),
    "parameter": ("of", ""),
    "permuted": ("devices in another order", "{:.1e}"),
    "goal": ("goal", "<= {:.0e}"),
}


def parity_meshes(num_devices: int) -> list[MeshConfig]:
    """Returns a mesh for each axis, with up to eight devices on it and the rest on `replica`."""
    size = max(each for each in (1, 2, 4, 8) if num_devices % each == 0)
    alone = {"replica": num_devices, "fsdp": num_devices}
    meshes = [
        MeshConfig(**({"fsdp": 1, axis: num_devices} if axis in alone else _axis_sizes(axis, size, num_devices)))
        for axis in AXES
    ]
    return [mesh for mesh in meshes if max(mesh.sizes) > 1]


def _axis_sizes(axis: str, size: int, num_devices: int) -> dict[str, int]:
    return {"replica": num_devices // size, "fsdp": 1, axis: size}


def _mesh_row(config: str, overrides: tuple[str, ...], mesh: MeshConfig) -> TableRow:
    found = compare_mesh(config, overrides, mesh)
    return {
        "loss": found.loss,
        "gradient": found.gradient,
        "parameter": found.parameter,
        "permuted": found.permuted,
        "goal": TOLERANCE,
    }


@cache
def _on_one(config: str, devices: tuple[Device, ...]) -> Arrays:
    return batch_gradients(load_on_mesh(config, (), MeshConfig(fsdp=1), microbatches=1), devices=lambda: devices)


def _against_cpu_row(config: str, cpus: Sequence[Device]) -> TableRow:
    """Compares one device with the CPU of the host, whose compiler and arithmetic are others."""
    expected = _on_one(config, tuple(cpus[:1]))
    differences = relative_differences(_on_one(config, tuple(jax.local_devices()[:1])), expected)
    found = mesh_difference(config, "one device", differences, differences)
    return {"loss": found.loss, "gradient": found.gradient, "parameter": found.parameter, "goal": TOLERANCE}


def _cpus() -> Sequence[Device]:
    """Returns the CPU devices of this process; [] if JAX runs without its CPU platform."""
    try:
        return jax.local_devices(backend="cpu")
    except RuntimeError:
        return []


def cases(setting: Setting) -> Iterator[Case]:
    """Yields one device against the CPU, then each mesh axis against one device."""
    count, (dense, experts) = len(jax.devices()), PARITY_CONFIGS
    if not setting.is_small and jax.process_count() == 1 and (cpus := _cpus()):
        for config in PARITY_CONFIGS:
            title = f"{config.rpartition('_')[2].removesuffix('.py')}, one device against the CPU"
            yield Case(title, partial(_against_cpu_row, config, cpus))
    if count == 1:
        yield from unmeasured("meshes", "there is one device, so no mesh to compare with it")
        return
    overrides = (f"train.global_batch={max(32, 4 * count)}",)  # a row for each device in each of four microbatches
    for mesh in parity_meshes(count):
        yield Case(f"dense, {mesh_name(mesh)}", partial(_mesh_row, dense, overrides, mesh))
        if mesh.expert > 1:
            yield Case(f"experts, {mesh_name(mesh)}", partial(_mesh_row, experts, overrides, mesh))


PART = Part(COLUMNS, 100, cases)
