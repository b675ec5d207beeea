"""Asks the metadata server of a Cloud TPU VM for what GKE puts into the environment: the hosts of its slice.

The address is metadata.google.internal, or GCE_METADATA_HOST as in Google's libraries, or GCE_METADATA_IP as in JAX.
"""

import http.client
import itertools
import re
import time
from collections.abc import Mapping

from jaxinfra.errors import ConfigError
from jaxinfra.machine.platforms import has_tpu_on_pci
from jaxinfra.processes import maintenance, schedulers

_TRIES = 6  # as JAX
_PAUSE_S = 0.5
_TIMEOUT_S = 10.0
_MEGASCALE = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")


def read_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns TPU_WORKER_HOSTNAMES, TPU_WORKER_ID and, for several slices, MEGASCALE_* of a TPU VM; {} elsewhere.

    A machine without TPU is not asked, nor one whose environment has the hosts or TPU_SKIP_MDS_QUERY. Variables of the
    environment replace those of the server. JAX_FORCE_TPU_INIT stands for a TPU, as in JAX.

    Raises:
        ConfigError: the machine has a TPU, but its metadata server does not answer or makes no sense.
    """
    has_tpu = has_tpu_on_pci() or "JAX_FORCE_TPU_INIT" in environment
    known = schedulers.on_cloud_tpu(environment) or "TPU_SKIP_MDS_QUERY" in environment
    if not has_tpu or known or not schedulers.may_use_tpu(environment):
        return {}
    address = environment.get("GCE_METADATA_HOST") or environment.get("GCE_METADATA_IP") or "metadata.google.internal"
    worker = _attribute(address, "agent-worker-number")
    if worker is None:
        return {}
    endpoints = _attribute(address, "worker-network-endpoints")
    if endpoints is None:
        raise ConfigError(f"http://{address}: attribute worker-network-endpoints is missing; set TPU_WORKER_HOSTNAMES")
    settings = _settings(_attribute(address, "tpu-env") or "")
    variables = {"TPU_WORKER_ID": worker.strip(), "TPU_WORKER_HOSTNAMES": ",".join(_hosts(endpoints))}
    variables |= {name: settings[name] for name in _MEGASCALE if name in settings}
    return {name: environment.get(name, value) for name, value in variables.items()}


def _hosts(endpoints: str) -> list[str]:
    """Returns the hosts of worker-network-endpoints: each is HOST, or NAME:ID:IP in the old format."""
    workers = [worker.strip().split(":") for worker in endpoints.split(",")]
    if not all(len(worker) in (1, 3) and worker[-1] for worker in workers):
        raise ConfigError(
            f"worker-network-endpoints={endpoints.strip()!r}: expected hosts or NAME:ID:IP; set TPU_WORKER_HOSTNAMES"
        )
    return [worker[-1] for worker in workers]


def _settings(tpu_env: str) -> dict[str, str]:
    """Returns the variables of tpu-env, which has lines such as `MEGASCALE_NUM_SLICES: '2'`."""
    return {match[1]: match[2] for match in re.finditer(r"^\s*(\w+)\s*:\s*'?(.*?)'?\s*$", tpu_env, re.MULTILINE)}


def _attribute(address: str, name: str) -> str | None:
    """Returns an attribute of this machine, None if it has none of this name; tries again while the server is down."""
    url = f"http://{address}/computeMetadata/v1/instance/attributes/{name}"
    for attempt in itertools.count(1):
        try:
            return maintenance.get(url, {"Metadata-Flavor": "Google"}, timeout_s=_TIMEOUT_S)
        except (OSError, http.client.HTTPException) as error:
            if attempt == _TRIES:
                raise ConfigError(
                    f"{url}: no answer: {error}; set TPU_SKIP_MDS_QUERY=1 if this TPU is not in Google's cloud, or has "
                    "one host"
                ) from error
        time.sleep(_PAUSE_S)
