"""Checks of the host that this process runs on, which measure nothing and take a moment.

Each is a function of what the system says, so that a test can say something else.
"""

import math
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from jaxinfra.doctor.findings import Finding
from jaxinfra.errors import StorageError
from jaxinfra.machine.environment import package_versions
from jaxinfra.storage.location import is_remote
from jaxinfra.track.formatting import format_bytes
from jaxinfra.track.memory import available_bytes, total_bytes

_MOUNTS, _SHM, _RDMA = Path("/proc/self/mounts"), Path("/dev/shm"), Path("/sys/class/infiniband")
_FEWEST_FILES, _FEW_FILES = 256, 4096  # a process has some 100 open; stores and checkpoints add one for each shard
_SMALL_SHM = 10**9  # Docker's default is 64 MiB
_NVIDIA_SMI_S = 30
_MOUNT_FIXES = {
    r",(ro),": "use root=FOLDER on another disk, or mount it with rw",
    r"^nfs.*,(soft|softerr),": "mount it with hard: else a server that is slow for a while breaks saves, or files",
    r"^nfs.*,(noac|actimeo=0),": "mount it without, as it asks the server at each access",
    r"^nfs.*,((?:actimeo|acdirmax)=(?:[7-9]\d|6[1-9]|\d{3,})),": "use acdirmax=60: a start waits 90 s for new files",
    r"^nfs.*,(nolock|local_lock=all|local_lock=flock),": "mount it without: `data prepare` locks files of all hosts",
    r"^lustre(?!.*,flock,)()": "mount it with flock: `data prepare` locks files of all hosts",
}
"""Fixes for mounts that harm a run, by a pattern of type and options. From nfs(5); `flock` from mount.lustre(8)."""
_DRIVERS = {"jax-cuda12-plugin": 525, "jax-cuda13-plugin": 580}
"""The oldest driver of each plugin (docs.jax.dev/en/latest/installation.html)."""


def host_findings(location: str, platform: str) -> list[Finding]:
    """Returns what the checks of this host find; `location` is where runs are, `platform` such as "cpu" or "cuda"."""
    has_rdma = _RDMA.is_dir() and any(_RDMA.iterdir())
    found = [
        open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], has_rdma=has_rdma),
    ]
    if _SHM.is_dir():
        found.append(shared_memory(shutil.disk_usage(_SHM).total, platform))
    if math.isfinite(total := total_bytes()):
        found.append(Finding("memory", "ok", f"{format_bytes(available_bytes())} of {format_bytes(total)} free"))
    if not is_remote(location) and _MOUNTS.exists():
        found.append(mount_options(_MOUNTS.read_text(errors="surrogateescape"), location))
    return found


def open_files(soft: int, hard: int) -> Finding:
    """Checks RLIMIT_NOFILE."""
    soft, hard = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    if soft >= _FEW_FILES:
        return Finding("open files", "ok", f"at most {soft:,}")
    fix = "raise the limit in /etc/security/limits.conf, or by --ulimit nofile=65536 of the container"
    if hard >= _FEW_FILES:
        fix = f"`ulimit -n {min(hard, 65536)}` before the start"
    return Finding("open files", "fail" if soft < _FEWEST_FILES else "warn", f"at most {soft:,}", fix)


def locked_memory(limit: int, *, has_rdma: bool) -> Finding:
    """Checks RLIMIT_MEMLOCK: network cards with RDMA read and write locked memory."""
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"at most {format_bytes(limit)}"
    if limit == resource.RLIM_INFINITY or not has_rdma:
        return Finding("locked memory", "ok", found)
    fix = "`ulimit -l unlimited` before the start, or `--ulimit memlock=-1` of the container: NCCL needs it for RDMA"
    return Finding("locked memory", "warn", found, fix)


def shared_memory(total: float, platform: str) -> Finding:
    """Checks the size of /dev/shm, through which NCCL sends between the GPUs of a host."""
    if platform in ("cpu", "tpu") or total >= _SMALL_SHM:
        return Finding(str(_SHM), "ok", format_bytes(total))
    fix = "start the container with --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
    return Finding(str(_SHM), "warn", format_bytes(total), fix)


def mount_options(mounts: str, folder: str) -> Finding:
    """Checks how the file system of a folder is mounted; `mounts` is as /proc/self/mounts."""
    path, at, kind, options = os.path.realpath(folder), "", "?", ""
    for line in mounts.splitlines():
        _, mount, its_kind, its_options, *_ = line.split(" ")
        mount = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount)
        if len(mount) >= len(at) and Path(path).is_relative_to(mount):
            at, kind, options = mount, its_kind, its_options
    found = {pattern: re.search(pattern, f"{kind}:,{options},") for pattern in _MOUNT_FIXES}
    problems = {match[1] or "no flock": _MOUNT_FIXES[pattern] for pattern, match in found.items() if match}
    level = "fail" if "ro" in problems else "warn" if problems else "ok"
    text = f"{kind} at {at}{': ' if problems else ''}{', '.join(problems)}"
    return Finding("mount", level, text, "; ".join(problems.values()), StorageError.exit_code)


def driver(platform: str) -> Finding | None:
    """Checks the driver of NVIDIA's GPUs by nvidia-smi, if this host has that."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=False)
        said = done.stdout + done.stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if gpus := re.findall(r"^(\d[\d.]*), (.+)$", said, re.MULTILINE):
        return judge_driver(gpus, platform)
    level, fix = "warn" if platform == "cpu" else "fail", "load the driver again, or restart the host"
    return Finding("driver", level, f"nvidia-smi: {' '.join(said.split())}", fix)


def judge_driver(gpus: Sequence[Sequence[str]], platform: str) -> Finding:
    """Checks the driver for JAX's plugin, and that JAX uses the GPUs; `gpus` are driver and name of each."""
    version, found = gpus[0][0], f"{gpus[0][0]}, {len(gpus)} x {gpus[0][1]}"
    plugins = [name for name, installed in package_versions(_DRIVERS).items() if installed]
    oldest = max((_DRIVERS[name] for name in plugins), default=0)
    if int(version.split(".")[0]) < oldest:
        return Finding("driver", "fail", found, f"install driver {oldest} or newer, which {plugins[-1]} needs")
    if platform == "cpu":
        return Finding("driver", "warn", f"{found}; JAX uses the CPU", "`pip install 'jax[cuda13]'`, or --devices cpu")
    return Finding("driver", "ok", found)
