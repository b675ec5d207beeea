"""Finds the JAX platforms with hardware: an installed plugin without hardware logs pages before it gives up."""

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
    """Returns a value for JAX_PLATFORMS without the installed platforms whose hardware is missing.

    Returns None, with which JAX tries all platforms, if none is to be left out or an unknown plugin is installed.
    """
    plugins = {entry.name for entry in entry_points(group="jax_plugins")}
    if sys.platform != "linux" or not all(name.startswith("xla_cuda") for name in plugins):
        return None
    has_tpu = any(map(glob.glob, _TPU_PATHS)) or _has_tpu_on_pci() or "TPU_WORKER_HOSTNAMES" in os.environ
    present = {"cuda": any(map(glob.glob, _GPU_PATHS)), "tpu": has_tpu}
    packages = {"cuda": bool(plugins), "tpu": find_spec("libtpu") is not None}
    installed = [name for name, is_installed in packages.items() if is_installed]
    if all(present[name] for name in installed):
        return None
    return ",".join([*(name for name in installed if present[name]), "cpu"])


def _has_tpu_on_pci() -> bool:
    """Returns whether a PCI device by Google is neither storage (class 0x01) nor a network card (0x02)."""
    vendors = map(Path, glob.glob("/sys/bus/pci/devices/*/vendor"))
    classes = (path.with_name("class") for path in vendors if path.read_text().strip() == _GOOGLE_PCI_VENDOR)
    return any(path.read_text()[:4] not in ("0x01", "0x02") for path in classes)
