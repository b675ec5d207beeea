"""Which API of Google Cloud makes which chips, on which machines and from which images.

Read in November 2026 from the pages that each row names. A run may name another image or runtime version by `--image`.
GPU machines get one network interface: hosts of h200 and b200 exchange gradients faster over an RDMA network, which
needs networks of its own; make such a group by hand, and give its `--name`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxinfra.errors import ConfigError
from jaxinfra.plan.slice_sizes import SLICES
from jaxinfra.plan.topology import Topology, parse_topology

IMAGE_PROJECT = "ubuntu-os-accelerator-images"
"""Owns the image families of the table."""

_DOCS = "https://docs.cloud.google.com"


@dataclass(frozen=True, kw_only=True)
class TpuType:
    """Chips as the Cloud TPU API takes them."""

    prefix: str  # of the accelerator type, as in v5litepod-16
    config_type: str  # of `AcceleratorConfig`, for shapes that are not the default of their size
    runtime_version: str
    source: str


@dataclass(frozen=True, kw_only=True)
class MachineType:
    """Chips as Compute Engine takes them."""

    machines: Mapping[int, str]  # machine type by the number of chips of a host
    chips_per_host: int  # where there are several hosts
    image_family: str
    disk_type: str
    reservation_bound: bool = True  # whether machines of a reservation end with it
    has_policy: bool = True  # whether a workload policy places several hosts close to each other
    source: str

    @property
    def image(self) -> str:
        """The image of the table, as an instance template takes it."""
        return f"projects/{IMAGE_PROJECT}/global/images/family/{self.image_family}"


_RUNTIMES = f"{_DOCS}/tpu/docs/runtimes"
TPU_TYPES = {
    "v4": TpuType(prefix="v4", config_type="V4", runtime_version="tpu-ubuntu2204-base", source=_RUNTIMES),
    "v5e": TpuType(
        prefix="v5litepod", config_type="V5LITE_POD", runtime_version="v2-alpha-tpuv5-lite", source=_RUNTIMES
    ),
    "v5p": TpuType(prefix="v5p", config_type="V5P", runtime_version="v2-alpha-tpuv5", source=_RUNTIMES),
    "v6e": TpuType(prefix="v6e", config_type="V6E", runtime_version="v2-alpha-tpuv6e", source=_RUNTIMES),
}
"""By chip, for `--place tpu-vm`."""

_TPU_MACHINES, _GPU_MACHINES = f"{_DOCS}/compute/docs/tpus/tpu-machines", f"{_DOCS}/compute/docs/gpus"
_TPU_IMAGE, _GPU_IMAGE = "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e", "ubuntu-accelerator-2404-amd64-with-nvidia-580"
MACHINE_TYPES = {
    "v5p": MachineType(
        machines={1: "ct5p-hightpu-1t", 2: "ct5p-hightpu-2t", 4: "ct5p-hightpu-4t"},
        chips_per_host=4,
        image_family=_TPU_IMAGE,
        disk_type="pd-balanced",
        source=_TPU_MACHINES,
    ),
    "v6e": MachineType(
        machines={1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
        chips_per_host=4,
        image_family=_TPU_IMAGE,
        disk_type="hyperdisk-balanced",
        source=_TPU_MACHINES,
    ),
    "tpu7x": MachineType(
        machines={4: "tpu7x-standard-4t"},
        chips_per_host=4,
        image_family="ubuntu-accel-2404-amd64-tpu-tpu7x",
        disk_type="hyperdisk-balanced",
        source=_TPU_MACHINES,
    ),
    "a100": MachineType(
        machines={count: f"a2-ultragpu-{count}g" for count in (1, 2, 4, 8)},
        chips_per_host=8,
        image_family=_GPU_IMAGE,
        disk_type="pd-balanced",
        reservation_bound=False,
        has_policy=False,
        source=_GPU_MACHINES,
    ),
    "h100": MachineType(
        machines={count: f"a3-highgpu-{count}g" for count in (1, 2, 4, 8)},
        chips_per_host=8,
        image_family=_GPU_IMAGE,
        disk_type="pd-balanced",
        reservation_bound=False,
        source=_GPU_MACHINES,
    ),
    "h200": MachineType(
        machines={8: "a3-ultragpu-8g"},
        chips_per_host=8,
        image_family=_GPU_IMAGE,
        disk_type="hyperdisk-balanced",
        source=_GPU_MACHINES,
    ),
    "b200": MachineType(
        machines={8: "a4-highgpu-8g"},
        chips_per_host=8,
        image_family=_GPU_IMAGE,
        disk_type="hyperdisk-balanced",
        source=_GPU_MACHINES,
    ),
}
"""By chip, for `--place gce`."""


@dataclass(frozen=True, kw_only=True)
class Machines:
    """What Compute Engine is to make for each slice; GPUs are one slice."""

    type: MachineType
    machine: str  # machine type
    hosts: int  # of a slice
    topology: str  # of TPUs whose slice has several hosts, "" of others


def topology_of(create: str) -> Topology:
    """Parses `--create`, which has the forms of `--on`."""
    try:
        return parse_topology(create)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--on ", "--create ")) from None


def tpu_type(topology: Topology) -> TpuType:
    """Returns how the Cloud TPU API names these chips; raises ConfigError if it does not have them."""
    name = topology.chip.name
    if name not in TPU_TYPES:
        raise ConfigError(f"--create {topology}: the Cloud TPU API has no {name}; use --place gce, which has it")
    return TPU_TYPES[name]


def accelerator_type(topology: Topology) -> str | None:
    """Returns the accelerator type of a slice, such as v5litepod-16; None if its shape is not that of its size."""
    shape = "x".join(map(str, topology.shape))
    sizes = [size for size, default in SLICES[topology.chip.name].items() if default == shape]
    return f"{tpu_type(topology).prefix}-{sizes[0]}" if sizes else None


def machines_of(topology: Topology) -> Machines:
    """Returns the machines of Compute Engine; raises ConfigError if it does not have these chips."""
    name, shape = topology.chip.name, topology.shape
    if name not in MACHINE_TYPES:
        raise ConfigError(f"--create {topology}: Compute Engine has no {name}; use --place tpu-vm, which has it")
    kind, is_gpu = MACHINE_TYPES[name], topology.chip.platform == "cuda"
    hosts, chips = shape if is_gpu else (1, math.prod(shape))
    if not is_gpu and chips not in kind.machines and chips % kind.chips_per_host == 0:
        hosts, chips = chips // kind.chips_per_host, kind.chips_per_host
    if chips not in kind.machines:
        counts = " or ".join(map(str, kind.machines))
        unit = "GPUs" if is_gpu else "chips"
        use = f"{name}:{hosts}x{kind.chips_per_host}" if is_gpu else f"{name}:2x2" + "x1" * (len(shape) - 2)
        raise ConfigError(f"--create {topology}: a host of {name} has {counts} {unit}; use --create {use}")
    sizes = "x".join(map(str, shape)) if hosts > 1 and not is_gpu else ""
    return Machines(type=kind, machine=kind.machines[chips], hosts=hosts, topology=sizes)
