"""The platforms that JAX should try here: a plugin without its hardware prints pages before it gives up."""

import glob
import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

_GPUS = ("/dev/nvidia[0-9]*", "/dev/dxg", "/dev/nvhost-gpu")  # on servers, under WSL, and on Jetsons
_TPUS = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")
_GOOGLE = "0x1ae0"  # vendor of PCI devices: of TPUs, but also of the disks and the network of virtual machines


def available_platforms() -> str | None:
    """Returns JAX_PLATFORMS without the plugins that are installed but have no hardware here.

    None where there is nothing to leave out, or a plugin is installed that this does not know: JAX then tries all.
    """
    plugins = {entry.name for entry in entry_points(group="jax_plugins")}
    if sys.platform != "linux" or not all(name.startswith("xla_cuda") for name in plugins):
        return None
    installed = {"cuda": bool(plugins), "tpu": find_spec("libtpu") is not None}
    tpu = any(map(glob.glob, _TPUS)) or _has_tpu_on_pci() or "TPU_WORKER_HOSTNAMES" in os.environ
    here = {"cuda": any(map(glob.glob, _GPUS)), "tpu": tpu}
    if not any(installed[name] and not here[name] for name in installed):
        return None
    return ",".join([*(name for name in installed if installed[name] and here[name]), "cpu"])


def _has_tpu_on_pci() -> bool:
    """Tells whether there is a PCI device of Google that is no storage (class 0x01) and no network (0x02)."""
    vendors = map(Path, glob.glob("/sys/bus/pci/devices/*/vendor"))
    google = (path.with_name("class") for path in vendors if path.read_text().strip() == _GOOGLE)
    return any(kind.read_text()[:4] not in ("0x01", "0x02") for kind in google)
