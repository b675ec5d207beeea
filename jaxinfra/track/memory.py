"""Host memory, open files and threads of this process, cheap enough to read at every logged step (about 50 us)."""

import math
import os
import resource
import sys
from pathlib import Path

_MEMINFO, _LIMITS = Path("/proc/meminfo"), ("memory.max", "memory/memory.limit_in_bytes")  # of cgroups v2 and v1
_STATM, _FILES, _THREADS = Path("/proc/self/statm"), "/proc/self/fd", "/proc/self/task"


def rss_bytes() -> int:
    """Returns the resident set size of this process in bytes, or without /proc (macOS) its maximum so far."""
    try:
        resident_pages = int(_STATM.read_bytes().split()[1])
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # in KiB, except on macOS
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> float:
    """Returns the host memory that this process can still get, at most its container's; infinite where none tells."""
    return _host_bytes("MemAvailable")


def total_bytes() -> float:
    """Returns the memory of the host with its swap, free or not, at most its container's; infinite where none tells."""
    return _host_bytes("MemTotal", "SwapTotal")


def _host_bytes(*fields: str) -> float:
    if not _MEMINFO.exists():
        return math.inf
    found = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    limits = [path.read_text().strip() for name in _LIMITS if (path := Path("/sys/fs/cgroup", name)).exists()]
    of_host = sum(int(found[field].split()[0]) * 1024.0 for field in fields)
    return min([of_host, *(float(each) for each in limits if each != "max")])


def process_metrics() -> dict[str, float]:
    """Returns the resident memory, and the number of open files and of threads where /proc has them."""
    counts = {"open_files": _FILES, "threads": _THREADS}
    found = {name: float(len(os.listdir(folder))) for name, folder in counts.items() if os.path.isdir(folder)}
    return {"rss_bytes": float(rss_bytes()), **found}
