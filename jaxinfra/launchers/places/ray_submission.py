"""Says what Ray's Jobs API gets for a run: the command of the driver, its environment, and its workers' chips.

Imports no Ray.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.manifests import pods_of
from jaxinfra.launchers.places.on_host import SAVE_S
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.ray_package import KEY_VARIABLE
from jaxinfra.launchers.places.run_files import split_location
from jaxinfra.plan.topology import parse_topology

RAY_DRIVER = "jaxinfra.cli.ray_driver"
"""The module that runs as the driver of the job."""
VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Hold the address of a cluster where the options have none, the first before the second."""
_TPUS = {"v4": "TPU-V4", "v5e": "TPU-V5LITEPOD", "v5p": "TPU-V5P", "v6e": "TPU-V6E", "tpu7x": "TPU-V7X"}  # as of Ray


def address_of(place: PlaceOptions) -> str:
    """Returns the URL of the cluster's dashboard, "" if nothing says it; raises ConfigError for another address."""
    named = next((name for name in VARIABLES if os.environ.get(name)), "")
    address = (place.address or os.environ.get(named, "")).rstrip("/")
    if address and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", address):
        source = "--address " if place.address else f"{named}="
        raise ConfigError(f"{source}{address}: expected that of the dashboard; use --address http://HEAD:8265")
    return address


def scaling_of(place: PlaceOptions) -> dict[str, Any]:
    """Returns the arguments of Ray Train's ScalingConfig: a worker on each host, with all its chips."""
    workers: dict[str, Any] = {"num_workers": pods_of(place).count}
    if not (limits := pods_of(place).limits):
        return workers
    topology, (chips,) = parse_topology(place.accelerator), limits.values()
    name = topology.chip.name
    if topology.chip.platform != "tpu":
        chosen = {"use_gpu": True, "accelerator_type": name.upper(), "resources_per_worker": {"GPU": chips}}
        return {**workers, **chosen}
    shape = "x".join(map(str, topology.shape))
    chosen = {"topology": shape, "accelerator_type": _TPUS[name], "resources_per_worker": {"TPU": chips}}
    return {**workers, "use_tpu": True, **chosen}


def submission_id(job: Job, number: int | str) -> str:
    """Returns the name of an attempt among the jobs of a cluster."""
    return f"{job.id}-{number}"


def submission(
    job: Job, number: int | str, *, working_dir: str, key: str = "", left_s: float = 0.0
) -> Mapping[str, Any]:
    """Returns the arguments of `JobSubmissionClient.submit_job`.

    Args:
        job: what to run.
        number: of the attempt, or a word for it.
        working_dir: archive of the code.
        key: of the secrets in it; "" if there are none.
        left_s: seconds until the deadline; 0 is none.
    """
    split = split_location(job.location)
    module, *words = job.command[1:]
    facts = [
        split[1] if split else job.location,
        str(number),
        job.folder,
        str(left_s),
        json.dumps(scaling_of(job.place)),
    ]
    told = {
        "RAY_JOB_STOP_WAIT_TIME_S": str(round(SAVE_S)),  # of the supervisor of the job, from SIGTERM to SIGKILL
        "RAY_DEDUP_LOGS": "0",
        "RAY_COLOR_PREFIX": "0",
        **job.environment,
        **({KEY_VARIABLE: key} if key else {}),
    }
    return {
        "submission_id": submission_id(job, number),
        "entrypoint": shlex.join(["exec", "python", "-m", module, *facts, *words]),
        "runtime_env": {"working_dir": working_dir, "env_vars": told},
        "metadata": {"run": job.location, "attempt": str(number)},
    }
