"""What the pretended Google Cloud has: zones, chips, slices, machine types, runtime versions.

Sources: Google Cloud's pages on TPU regions, on the system architecture of each TPU, on TPU machine types of Compute
Engine, and on its GPU machine types. The project's own tables are not asked, so that a wrong row of theirs is refused.
"""

import math
import re
from dataclasses import dataclass

ZONES: dict[str, frozenset[str]] = {
    "us-central2-b": frozenset({"v4"}),
    "us-central1-a": frozenset({"v5e", "v5p", "h100", "a100"}),
    "us-central1-c": frozenset({"tpu7x", "h100", "a100"}),
    "us-west4-a": frozenset({"v5e"}),
    "us-west1-c": frozenset({"v5e", "b200", "h200"}),
    "us-east1-d": frozenset({"v6e"}),
    "us-east5-a": frozenset({"v5p", "v6e"}),
    "us-east5-b": frozenset({"v6e"}),
    "us-east4-a": frozenset({"h100"}),
    "us-east4-b": frozenset({"b200"}),
    "europe-west4-a": frozenset({"v6e", "h100"}),
    "europe-west4-b": frozenset({"v5e", "v5p"}),
}
"""The chips of each zone."""

RUNTIME_VERSIONS = (
    "tpu-ubuntu2204-base",
    "tpu-vm-base",
    "v2-alpha-tpuv5",
    "v2-alpha-tpuv5-lite",
    "v2-alpha-tpuv6e",
)

_TPU_NAMES = {"v4": ("v4", 2), "v5p": ("v5p", 2), "v5litepod": ("v5e", 1), "v6e": ("v6e", 1)}  # and cores counted
_TYPES = {"V4": "v4", "V5P": "v5p", "V5LITE_POD": "v5e", "V6E": "v6e"}  # of AcceleratorConfig
_SINGLE_HOST_CHIPS = {"v5e": (1, 4, 8), "v6e": (1, 4, 8)}
_MACHINE_TYPES = {
    "v5p": {f"ct5p-hightpu-{n}t": n for n in (1, 2, 4)},
    "v6e": {f"ct6e-standard-{n}t": n for n in (1, 4, 8)},
    "tpu7x": {"tpu7x-standard-4t": 4},
    "a100": {f"a2-ultragpu-{n}g": n for n in (1, 2, 4, 8)},
    "h100": {f"a3-highgpu-{n}g": n for n in (1, 2, 4, 8)} | {"a3-megagpu-8g": 8},
    "h200": {"a3-ultragpu-8g": 8},
    "b200": {"a4-highgpu-8g": 8},
}
_PLAIN_MACHINE = re.compile(r"(e2|n1|n2|n2d|n4|c3|c4)-(standard|highmem|highcpu)-\d+")


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A slice of the Cloud TPU API."""

    chip: str
    chips: int
    num_hosts: int


def accelerator_type(name: str) -> Slice | None:
    """Returns the slice of a name such as v5p-16, or None if no slice has it."""
    match = re.fullmatch(r"(v4|v5p|v5litepod|v6e)-(\d+)", name)
    if match is None:
        return None
    chip, counted = _TPU_NAMES[match[1]]
    chips, rest = divmod(int(match[2]), counted)
    return None if rest else _slice(chip, chips)


def accelerator_config(type_name: str, topology: str) -> Slice | None:
    """Returns the slice of a type such as V6E and a topology such as 4x4, or None."""
    chip = _TYPES.get(type_name)
    num_dims = 2 if chip in ("v5e", "v6e") else 3
    if chip is None or not re.fullmatch(rf"\d+(x\d+){{{num_dims - 1}}}", topology):
        return None
    return _slice(chip, math.prod(map(int, topology.split("x"))))


def accelerator_types(zone: str) -> list[str]:
    """Returns the names of all slices of a zone."""
    names = [f"{family}-{2**power}" for family in _TPU_NAMES for power in range(13)]
    return [name for name in names if (found := accelerator_type(name)) and found.chip in ZONES[zone]]


def _slice(chip: str, chips: int) -> Slice | None:
    if chips in (single := _SINGLE_HOST_CHIPS.get(chip, ())):
        return Slice(chip=chip, chips=chips, num_hosts=1)
    most = 256 if single else 2048 if chip == "v4" else 6144
    return None if chips % 4 or not 4 <= chips <= most else Slice(chip=chip, chips=chips, num_hosts=chips // 4)


def machine_type(zone: str, name: str) -> tuple[str, int] | None:
    """Returns the chip of a machine type, "" if it has none, and how many; None if the zone lacks the type."""
    for chip in ZONES[zone]:
        if name in _MACHINE_TYPES.get(chip, {}):
            return chip, _MACHINE_TYPES[chip][name]
    return ("", 0) if _PLAIN_MACHINE.fullmatch(name) else None


def has_accelerator(name: str) -> bool:
    """Whether a machine type of any zone has TPUs or GPUs, which no live migration can move."""
    return any(name in types for types in _MACHINE_TYPES.values())
