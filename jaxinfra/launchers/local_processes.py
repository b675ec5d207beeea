"""Divides the devices of this machine among processes, in the variables that JAX reads. Imports no JAX."""

import glob
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from itertools import takewhile

from jaxinfra.errors import ConfigError
from jaxinfra.machine.platforms import default_platform, num_tpu_chips
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.processes.peer_connection import free_port

_LOOPBACK = "127.0.0.1"
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_NVIDIA_SMI_TIMEOUT_S = 30


def process_environments(num_processes: int, devices: str | None) -> list[dict[str, str]]:
    """Returns the variables of each process: its number, where they meet, their secret, and its share of the devices.

    The platform and its number of devices are those that one process would have: `devices` is the value of --devices,
    which `choose_devices` has put into the environment.

    Raises ConfigError if this process is one of several already, or if the devices cannot be shared.
    """
    if already := [name for name in _VARIABLES if name in os.environ]:
        raise ConfigError(
            f"--processes {num_processes}: {already[0]}={os.environ[already[0]]} says that this is one of several "
            f"processes; leave out --processes, or unset {' '.join(already)}"
        )
    platform = default_platform()
    if platform == "cpu":
        shares = _cpu_shares(num_processes, devices)
    elif platform in ("cuda", "gpu"):
        shares = _gpu_shares(num_processes)
    else:
        raise ConfigError(
            f"--processes {num_processes}: one process drives all {platform} devices of a host; leave out --processes, "
            f"or use --devices cpu:{num_processes}"
        )
    coordinator, secret = f"{_LOOPBACK}:{free_port(_LOOPBACK)}", {SECRET: new_secret()}
    return [
        dict(zip(_VARIABLES, (coordinator, str(num_processes), str(rank)), strict=True)) | secret | dict(share)
        for rank, share in enumerate(shares)
    ]


def _cpu_shares(num_processes: int, devices: str | None) -> list[Mapping[str, str]]:
    """Returns equal shares of the emulated devices; one each if their number is not set."""
    total = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    count = int(total) if total.isdecimal() else num_processes
    if count % num_processes:
        source = f"--devices {devices}" if devices and ":" in devices else f"JAX_NUM_CPU_DEVICES={total}"
        more = -(-count // num_processes) * num_processes
        raise _indivisible(source, num_processes, count, f"--devices cpu:{more}, or ")
    share = {
        "JAX_NUM_CPU_DEVICES": str(count // num_processes),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    return [share] * num_processes


def _gpu_shares(num_processes: int) -> list[Mapping[str, str]]:
    gpus = visible_gpus()
    if not gpus:
        raise ConfigError(f"--processes {num_processes}: no GPU is visible; use --devices cpu:{num_processes}")
    if len(gpus) % num_processes:
        source = f"CUDA_VISIBLE_DEVICES={','.join(gpus)}" if "CUDA_VISIBLE_DEVICES" in os.environ else "this machine"
        raise _indivisible(source, num_processes, len(gpus), "")
    size = len(gpus) // num_processes
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[rank * size : (rank + 1) * size])} for rank in range(num_processes)]


def _indivisible(source: str, num_processes: int, count: int, other_fix: str) -> ConfigError:
    fitting = max(number for number in range(1, num_processes + 1) if count % number == 0)
    devices = f"{count} devices" if count > 1 else f"{count} device"
    return ConfigError(
        f"{source}: {devices} cannot be shared equally by --processes {num_processes}; use {other_fix}"
        f"--processes {fitting}"
    )


def visible_gpus() -> Sequence[str]:
    """Returns the numbers or UUIDs of the GPUs that a process would see, for CUDA_VISIBLE_DEVICES."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = (name.strip() for name in visible.split(","))
        return list(takewhile(lambda name: name and name != "-1", names))  # as CUDA does
    if shutil.which("nvidia-smi"):  # in a container there may be device files of GPUs that it must not use
        query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=False)
        if listed.returncode == 0:
            return listed.stdout.split()
    return [str(number) for number in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def local_devices() -> int:
    """Returns the number of devices that a process on this host will have; ConfigError if that is unknown."""
    platform = default_platform()
    if platform == "cpu":
        return int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1)
    count = len(visible_gpus()) if platform in ("cuda", "gpu") else num_tpu_chips()
    if not count:
        raise ConfigError(f"--elastic: no {platform} device is visible on this host; check the drivers, or --devices")
    return count
