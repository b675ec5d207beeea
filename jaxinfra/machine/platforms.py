"""Finds the JAX platforms whose hardware is present: a plugin without its hardware logs pages before it gives up."""

import glob
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

_GPU_PATHS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-gpu")  # on servers, in WSL, and on Jetsons
_TPU_PATHS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_GOOGLE_PCI_VENDOR = "0x1ae0"  # of TPUs, but also of the virtual disks and network cards of Google's cloud


def available_platforms() -> str | None:
    """Returns a value for JAX_PLATFORMS without the platforms whose hardware is missing, such as "cuda,cpu".

    Returns None, with which JAX tries all platforms, if no hardware is missing or an unknown plugin is installed.
    """
    if sys.platform != "linux" or not all(name.startswith("xla_cuda") for name in _plugins()):
        return None
    installed = _installed()
    usable = [platform for platform in installed if _has_hardware(platform)]
    return None if usable == installed else ",".join([*usable, "cpu"])


def default_platform() -> str:
    """Returns the platform that JAX will choose, such as "cuda", "tpu" or "cpu", or the name of an unknown plugin."""
    if chosen := os.environ.get("JAX_PLATFORMS"):
        return chosen.partition(",")[0]
    unknown = [name for name in _plugins() if not name.startswith("xla_cuda")]
    return next(iter([*unknown, *(platform for platform in _installed() if _has_hardware(platform))]), "cpu")


def _plugins() -> set[str]:
    return {entry.name for entry in entry_points(group="jax_plugins")}


def _installed() -> list[str]:
    """Returns the platforms that can be installed beside the CPU's, and are."""
    return (["cuda"] if _plugins() else []) + (["tpu"] if find_spec("libtpu") else [])


def _has_hardware(platform: str) -> bool:
    if any(map(glob.glob, _GPU_PATHS if platform == "cuda" else _TPU_PATHS)):
        return True
    return platform == "tpu" and (has_tpu_on_pci() or "TPU_WORKER_HOSTNAMES" in os.environ)


def has_tpu_on_pci() -> bool:
    """Returns whether a PCI device by Google is neither storage (class 0x01) nor a network card (0x02)."""
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        device_class = vendor.with_name("class")
        if vendor.read_text().strip() == _GOOGLE_PCI_VENDOR and device_class.read_text()[:4] not in ("0x01", "0x02"):
            return True
    return False


def num_tpu_chips() -> int:
    """Returns the number of TPU chips that Linux shows on this host; 0 without a driver."""
    return sum(len(glob.glob(path)) for path in _TPU_PATHS)
