"""Reads what schedulers tell the processes that they start, where it takes more than the value of one variable.

Each function takes the environment of a process and raises ConfigError if it is incomplete or impossible.
`discovery` says which function belongs to which scheduler.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from jaxinfra.errors import ConfigError

type Environment = Mapping[str, str]

_FIX = "set all of JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
_FROM_LABEL = "add it to the manifest, from the label jobset.sigs.k8s.io/{}"
_LOOPBACK = "127.0.0.1"
_PRRTE_NAMESPACE = re.compile(r"prte(?:run)?-(?P<host>.+)-(?P<pid>\d+)@\d+$")


def require(environment: Environment, name: str, fix: str = _FIX) -> str:
    """Returns the value of a variable, which must not be empty."""
    value = environment.get(name, "").strip()
    if not value:
        raise ConfigError(f"{name}: {'empty' if name in environment else 'not set'}, this process cannot join; {fix}")
    return value


def number(environment: Environment, name: str, fix: str = _FIX) -> int:
    """Returns the value of a variable, which must be a whole number of at least 0."""
    value = require(environment, name, fix)
    if not re.fullmatch("[0-9]+", value):
        raise ConfigError(f"{name}={value}: expected a whole number of at least 0; {fix}")
    return int(value)


def port_of_job(job: int) -> int:
    """Returns the port of a job: all its processes find the same, and jobs that share a host rarely do.

    JAX takes the same one of the last 4,096.
    """
    return 61_440 + job % 4096


def named_coordinator(environment: Environment) -> str:
    """Raises ConfigError: the scheduler does not tell the host of process 0, so the user has to."""
    return require(
        environment, "JAX_COORDINATOR_ADDRESS", "set JAX_COORDINATOR_ADDRESS=HOST:PORT, with the host of process 0"
    )


# Open MPI


def open_mpi_host(environment: Environment) -> str:
    """Returns the host of mpirun, where rank 0 runs unless the host file leaves it out; loopback for a single host.

    Open MPI 4 tells the addresses of its head node process, Open MPI 5 names its host in the namespace of the job:
    prterun-HOST-PID@1.
    """
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environment.get("OMPI_COMM_WORLD_SIZE"):
        return _LOOPBACK
    if match := re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", environment.get("OMPI_MCA_orte_hnp_uri", "")):
        return match[1] or f"[{match[2]}]"
    match = _PRRTE_NAMESPACE.match(environment.get("PMIX_NAMESPACE", ""))
    if not match:
        return named_coordinator(environment)
    own = environment.get("PMIX_HOSTNAME", match["host"])
    if environment.get("OMPI_COMM_WORLD_RANK") == "0" and own.split(".")[0] != match["host"].split(".")[0]:
        raise ConfigError(
            f"Open MPI runs rank 0 on {own}, but mpirun on {match['host']}, where the other ranks look for it; "
            f"use mpirun -x JAX_COORDINATOR_ADDRESS={own}:8476"
        )
    return match["host"]


def open_mpi_port(environment: Environment) -> int:
    """Returns a port from the number of the job in Open MPI 4, or the process id of mpirun in Open MPI 5."""
    if match := re.match(r"(\d+)\.", environment.get("OMPI_MCA_orte_hnp_uri", "")):
        return port_of_job(int(match[1]) // 4096)  # the lower 12 bits count the jobs of one mpirun
    match = _PRRTE_NAMESPACE.match(environment.get("PMIX_NAMESPACE", ""))
    return port_of_job(int(match["pid"]) if match else 0)


# MPICH


def mpich_host(environment: Environment) -> str:
    """Returns loopback if all ranks are on this host; MPICH does not tell other hosts."""
    local = environment.get("MPI_LOCALNRANKS") == environment.get("PMI_SIZE")
    return _LOOPBACK if local else named_coordinator(environment)


# Slurm


def slurm_host(environment: Environment) -> str:
    """Returns the host of task 0, which is the first of the step."""
    if _slurm_distribution(environment) == "arbitrary":
        raise ConfigError(
            "SLURM_DISTRIBUTION=arbitrary: Slurm does not tell the host of task 0; "
            "set JAX_COORDINATOR_ADDRESS=HOST:PORT, with the first host of SLURM_HOSTFILE"
        )
    return _slurm_nodes(environment)[0]


def slurm_hosts(environment: Environment) -> tuple[str, ...]:
    """Returns the host of each task; () unless tasks are distributed in blocks or cyclically."""
    nodes, counts = _slurm_nodes(environment), _slurm_tasks_per_node(environment)
    tasks = number(environment, "SLURM_STEP_NUM_TASKS")
    if len(nodes) != len(counts) or sum(counts) != tasks:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE: {sum(counts)} tasks on {len(counts)} nodes, but SLURM_STEP_NUM_TASKS={tasks} "
            f"and {len(nodes)} nodes in SLURM_STEP_NODELIST; {_FIX}"
        )
    match _slurm_distribution(environment):
        case "block":
            return tuple(node for node, count in zip(nodes, counts, strict=True) for _ in range(count))
        case "cyclic":
            rounds = range(max(counts))
            return tuple(node for each in rounds for node, count in zip(nodes, counts, strict=True) if count > each)
    return ()


def slurm_local_count(environment: Environment) -> int:
    """Returns how many tasks of the step run on this host."""
    counts, node = _slurm_tasks_per_node(environment), number(environment, "SLURM_NODEID")
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node}: SLURM_STEP_TASKS_PER_NODE has {len(counts)} nodes; {_FIX}")
    return counts[node]


def _slurm_distribution(environment: Environment) -> str:
    """Returns how tasks are distributed over the nodes: "block" of "block:cyclic", for example."""
    return re.split("[:,]", environment.get("SLURM_DISTRIBUTION", "block"))[0]


def _slurm_tasks_per_node(environment: Environment) -> list[int]:
    """Returns the tasks on each node: [2, 2, 1] for "2(x2),1"."""
    text = require(environment, "SLURM_STEP_TASKS_PER_NODE")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ConfigError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected numbers such as 2(x3),1; {_FIX}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _slurm_nodes(environment: Environment) -> list[str]:
    """Returns the nodes of the step: node08, node09, node10 and login for "node[08-10],login"."""
    name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_NODELIST"
    text = require(environment, name)
    item = r"(?:[^][,\s]|\[[\d,-]+\])+"
    if not re.fullmatch(rf"{item}(?:,{item})*", text):
        raise ConfigError(f"{name}={text}: expected hosts such as node[01-16],login; {_FIX}")
    nodes: list[str] = []
    for part in re.findall(item, text):
        choices = [_in_brackets(piece) for piece in re.findall(r"\[[^]]+\]|[^][]+", part)]
        nodes += map("".join, itertools.product(*choices))
    return nodes


def _in_brackets(piece: str) -> Iterator[str]:
    """Yields 08, 09, 10 and 12 for "[08-10,12]", and a piece without brackets itself."""
    if not piece.startswith("["):
        yield piece
        return
    for part in piece[1:-1].split(","):
        first, _, last = part.partition("-")
        for value in range(int(first), int(last or first) + 1):
            yield f"{value:0{len(first)}}"


# Cloud TPU


def on_cloud_tpu(environment: Environment) -> bool:
    """Returns whether the hosts of a TPU slice are named, and JAX may use the TPU."""
    return may_use_tpu(environment) and bool(_tpu_variable(environment))


def may_use_tpu(environment: Environment) -> bool:
    """Returns whether JAX_PLATFORMS is unset or contains tpu."""
    platforms = environment.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms.lower().split(",")


def tpu_host(environment: Environment) -> str:
    """Returns the first host of the first slice."""
    host = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0]
    if not host and _tpu_slices(environment) > 1:
        require(environment, "MEGASCALE_COORDINATOR_ADDRESS", "set it to the first host of slice 0")
    return host or _tpu_slice_hosts(environment)[0]


def tpu_hosts(environment: Environment) -> tuple[str, ...]:
    """Returns the hosts of the slice; () if there are several, because a slice knows its own only."""
    return _tpu_slice_hosts(environment) if _tpu_slices(environment) == 1 else ()


def tpu_count(environment: Environment) -> int:
    """Returns the number of hosts in all slices."""
    return len(_tpu_slice_hosts(environment)) * _tpu_slices(environment)


def hosts_per_slice(environment: Environment, count: int) -> int:
    """Returns how many of `count` hosts with TPUs are in a slice; they can only be used together."""
    return count // _tpu_slices(environment)


def tpu_index(environment: Environment) -> int:
    """Returns the index of this host in all slices, slice by slice."""
    hosts, slices = len(_tpu_slice_hosts(environment)), _tpu_slices(environment)
    slice_index = number(environment, "MEGASCALE_SLICE_ID") if slices > 1 else 0
    worker = number(environment, "TPU_WORKER_ID") if hosts > 1 else 0
    _check_below(worker, hosts, "TPU_WORKER_ID", _tpu_variable(environment))
    return slice_index * hosts + worker


def _tpu_slices(environment: Environment) -> int:
    return number(environment, "MEGASCALE_NUM_SLICES") if environment.get("MEGASCALE_NUM_SLICES") else 1


def _tpu_variable(environment: Environment) -> str:
    """Returns the variable that names the hosts of the slice, in the order in which JAX tries them; "" for none."""
    for name in ("TPU_PROCESS_ADDRESSES_PATH", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        value = environment.get(name, "").strip()
        # libtpu puts a sentence there if it finds no hosts.
        if value and (name.endswith("PATH") or " " not in value):
            return name
    return ""


def _tpu_slice_hosts(environment: Environment) -> tuple[str, ...]:
    name = _tpu_variable(environment)
    value = require(environment, name)
    if name == "TPU_PROCESS_ADDRESSES_PATH":
        try:
            value = Path(value).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}={value}: cannot be read: {error}; name a file of HOST:PORT,HOST:PORT") from error
    hosts = tuple(host.partition(":")[0].strip() for host in value.split(","))
    if not all(hosts):
        raise ConfigError(f"{name}: a host is empty in {value!r}; name every host of the slice, with commas between")
    return hosts


# Kubernetes


def kubernetes_count(environment: Environment) -> int:
    """Returns JAX_NUM_PROCESSES: Kubernetes does not tell its pods how many they are."""
    fix = "add it to the manifest, with the number of pods in all (1 if each pod trains a run of its own)"
    return number(environment, "JAX_NUM_PROCESSES", fix)


def kubernetes_host(environment: Environment) -> str:
    """Raises ConfigError: the subdomain of the headless service is in no variable of a pod."""
    index = environment.get("JOB_COMPLETION_INDEX", "")
    job = environment.get("HOSTNAME", "").removesuffix(f"-{index}") or "JOB"
    return require(
        environment,
        "JAX_COORDINATOR_ADDRESS",
        f"add it to the manifest, such as {job}-0.SUBDOMAIN with the subdomain of its headless service",
    )


def kubernetes_index(environment: Environment) -> int:
    """Returns the index of this pod in its Job, or in all Jobs of a JobSet, Job by Job."""
    index, count = number(environment, "JOB_COMPLETION_INDEX"), kubernetes_count(environment)
    if count == 1:  # each pod trains a run of its own
        return 0
    replicas = _job_replicas(environment)
    if replicas == 1:
        return index
    if count % replicas:
        raise ConfigError(
            f"JAX_NUM_PROCESSES={count}: {replicas} Jobs (JOBSET_REPLICAS) cannot have equally many pods; "
            "set JAX_NUM_PROCESSES to the number of pods in all"
        )
    job = number(environment, "JOBSET_JOB_INDEX", _FROM_LABEL.format("job-index"))
    _check_below(job, replicas, "JOBSET_JOB_INDEX", "JOBSET_REPLICAS")
    _check_below(index, count // replicas, "JOB_COMPLETION_INDEX", "JAX_NUM_PROCESSES")
    return job * (count // replicas) + index


def kubernetes_hosts(environment: Environment) -> tuple[str, ...]:
    """Returns the host names of the pods, JOB-INDEX.SUBDOMAIN, if the coordinator has such a name."""
    count, replicas = kubernetes_count(environment), _job_replicas(environment)
    numbers = [f"-{index}" for index in range(count)]
    if replicas > 1:
        numbers = [f"-{job}-{pod}" for job in range(replicas) for pod in range(count // replicas)]
    host = environment.get("JAX_COORDINATOR_ADDRESS", "").partition(":")[0]
    first, dot, subdomain = host.partition(".")
    if not first.endswith(numbers[0]):
        return ()
    return tuple(f"{first.removesuffix(numbers[0])}{each}{dot}{subdomain}" for each in numbers)


def _job_replicas(environment: Environment) -> int:
    if "JOBSET_REPLICAS" not in environment:
        return 1
    fix = _FROM_LABEL.format("replicatedjob-replicas")
    replicas = number(environment, "JOBSET_REPLICAS", fix)
    if replicas == 0:
        raise ConfigError(f"JOBSET_REPLICAS=0: expected at least 1; {fix}")
    return replicas


def _check_below(value: int, limit: int, name: str, limit_name: str) -> None:
    if value >= limit:
        raise ConfigError(f"{name}={value}: expected less than {limit}, by {limit_name}; {_FIX}")
