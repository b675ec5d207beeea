"""`bench accelerator --only environment`: the devices, their software and the host, without names and addresses."""

import os
import platform
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxinfra.machine.environment import git_state, package_versions
from jaxinfra.processes.devices import device_memory
from jaxinfra.processes.peers import current_peers
from jaxinfra.track.memory import total_bytes
from tests.bench.accelerator_timing import Case, Part, Setting
from tests.bench.table import Columns, TableRow, describe_machine

COLUMNS: Columns = {"value": ("value", "")}
PACKAGES = ("jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_ACCELERATOR_TYPE", "TPU_TOPOLOGY", "JAX_PLATFORMS")
_DRIVER = Path("/proc/driver/nvidia/version")


def describe() -> dict[str, str]:
    """Returns what the measurements were made on and with."""
    devices: list[Any] = list(jax.devices())
    device, commit, hosts = devices[0], git_state(Path(__file__).parent), set(current_peers().hosts)
    memory = device_memory({"limit": "bytes_limit"}).get("limit")
    found: dict[str, object] = {
        "device": device.device_kind,
        "devices": len(devices),
        "processes": f"{jax.process_count()} on {len(hosts)} host{'s' if len(hosts) > 1 else ''}",
        "memory of a device": f"{memory / 2**30:.1f} GiB for JAX" if memory else "not reported",
        "topology": _topology(devices),
        "runtime": " ".join(str(device.client.platform_version).split()),
        "driver": _DRIVER.read_text().splitlines()[0] if _DRIVER.is_file() else None,
        **package_versions(PACKAGES),
        **{name: os.environ.get(name) for name in VARIABLES},
        "host memory": f"{total_bytes() / 2**30:.1f} GiB",
        "os": platform.platform(terse=True),
        "commit": f"{commit['commit']}{', changed' if commit['dirty'] else ''}",
        **describe_machine(),
    }
    return {name: str(value) for name, value in found.items() if value is not None}


def _topology(devices: list[Any]) -> str | None:
    """Returns the extent of the coordinates of TPU chips, as "2x4x1", and the number of slices."""
    coords = [coords for device in devices if (coords := getattr(device, "coords", None))]
    if not coords:
        return None
    extent = "x".join(str(max(each) - min(each) + 1) for each in zip(*coords, strict=True))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return f"{extent}, {slices} slice{'s' if slices > 1 else ''}"


def _row(value: str) -> TableRow:
    return {"value": value}


def cases(setting: Setting) -> Iterator[Case]:
    """Yields a row for each fact."""
    del setting
    for name, value in describe().items():
        yield Case(name, partial(_row, value))


PART = Part(COLUMNS, 30, cases)
