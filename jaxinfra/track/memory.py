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
    """Returns the host memory that this process can still get, with swap; infinite where none tells.

    The limits of its container and of `ulimit -v` count as far as this process has not used them.
    """
    if not _MEMINFO.exists():
        return math.inf
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    limits = [path.read_text().strip() for name in _LIMITS if (path := Path("/sys/fs/cgroup", name)).exists()]
    free = sum(int(fields[name].split()[0]) * 1024.0 for name in ("MemAvailable", "SwapFree"))
    of_container = [float(each) - rss_bytes() for each in limits if each != "max"]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        mapped_pages = int(_STATM.read_bytes().split()[0])
        of_container.append(float(address_space - mapped_pages * os.sysconf("SC_PAGE_SIZE")))
    return max(min([free, *of_container]), 0.0)


def process_metrics() -> dict[str, float]:
    """Returns the resident memory, and the number of open files and of threads where /proc has them."""
    counts = {"open_files": _FILES, "threads": _THREADS}
    found = {name: float(len(os.listdir(folder))) for name, folder in counts.items() if os.path.isdir(folder)}
    return {"rss_bytes": float(rss_bytes()), **found}
