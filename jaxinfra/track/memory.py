"""Memory of this process and of its devices, cheap enough to read at every logged step."""

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

import jax

_STATM = Path("/proc/self/statm")
_MEMORY_METRICS = {"device_in_use_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}


def rss_bytes() -> int:
    """Returns the resident set size of this process in bytes, or without /proc (macOS) its maximum so far."""
    try:
        resident_pages = int(_STATM.read_bytes().split()[1])
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # in KiB, except on macOS
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def device_memory(names: Mapping[str, str] = _MEMORY_METRICS) -> dict[str, float]:
    """Returns figures of the fullest local device, by default use and peak; {} if the platform does not report them.

    `names` maps the names in the result to those of JAX.
    """
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    if not stats:
        return {}
    return {name: float(max(s[key] for s in stats)) for name, key in names.items() if key in stats[0]}
