"""A real Ray cluster of one node on loopback, with its jobs server; nothing of it is left afterwards."""

import os
import secrets
import shutil
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.servers.guard import free_ports, guarded, wait_until

# `ray start --head` also starts a server of Ray Client, and ends if that has waited 30 s for a slow machine.
_HEAD = """
import pathlib, signal, sys
import ray

folder, port, cpus = sys.argv[1:]
ray.init(
    num_cpus=int(cpus), include_dashboard=True, dashboard_host="127.0.0.1", dashboard_port=int(port),
    _temp_dir=folder, _node_ip_address="127.0.0.1", object_store_memory=100 * 2**20, log_to_driver=False,
)
# Where several clusters run on this machine, a job finds its own by the file that `ray start` would have written.
pathlib.Path(folder, "ray_current_cluster").write_text(ray.get_runtime_context().gcs_address)
print("started", flush=True)
signal.pause()
"""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback only
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_niceness": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
}


@contextmanager
def ray_cluster(cpus: int) -> Iterator[Mapping[str, str]]:
    """Runs a cluster with this number of logical CPUs; yields the environment of its clients."""
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # the paths of its sockets must be short
    (port,), log = free_ports(1), folder / "head.log"
    dropped = [f"--unset={name}" for name in os.environ if name.startswith(("JAX", "XLA", "PYTEST", "RAY"))]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    kept = {**_ENVIRONMENT, **token, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(folder)}
    command = ["env", *dropped, *(f"{name}={value}" for name, value in kept.items()), sys.executable, "-c", _HEAD]
    address = f"http://127.0.0.1:{port}"

    def has_jobs() -> None:
        if "started" not in log.read_text():
            raise OSError("its node has not started")
        headers = {"Authorization": f"Bearer {token['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=10):
            pass

    try:
        with guarded([*command, f"{folder}/ray", str(port), str(cpus)], log):
            wait_until(has_jobs, (OSError,), log, timeout_s=200)
            yield {"RAY_ADDRESS": address, **token}
    finally:
        shutil.rmtree(folder)
