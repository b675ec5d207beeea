"""Finds out whether this process is one of several, and which: one table, with a row for each way to start them.

It joins nothing: `join.join` does, with the result. JAX is not imported here, since it reads its settings when it is
imported. The table agrees with JAX's detection of clusters, except where JAX would be wrong or hang: a Slurm task with
several GPUs, Slurm's `--distribution=arbitrary`, and Open MPI 5 without mpi4py. So JAX's detection is turned off
(`cluster_detection_method="deactivate"`): it would fill in what is None here.

The first row that matches wins. A process inherits variables, so what is closest to it comes first:

1. The flags --coordinator, --process-id and --of, typed for this process.
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, set for a process of JAX inside any allocation: by a
   Kubeflow TrainJob, by jaxinfra's local launcher, and by who starts Ray actors of their own, which have none. After
   it come the schedulers that other packages add (`plugins.py`).
3. A worker of Ray Train (JaxTrainer), which is asked, not the environment: its variables are those of `ray start`, such
   as those of a Slurm step with one task a host.
4. Open MPI, MPICH and Intel MPI: in a Slurm job, mpirun starts one Slurm task a host, not one a process.
5. Slurm, by the variables of the step. Those of the job are also in a batch script, which is one process.
6. Other schedulers with PMI, such as PALS; after Slurm, as `srun --mpi=pmi2` sets PMI_SIZE, too.
7. Cloud TPU, by the variables that GKE sets or the metadata server of a TPU VM. They describe the machine, whatever
   runs on it. If JAX_PLATFORMS leaves the TPU out, they do not count: one worker may run something on its CPU.
8. Indexed Jobs of Kubernetes, alone or in a JobSet; after Cloud TPU, whose JobSets have one Job for each slice. Their
   manifests must add JAX_NUM_PROCESSES and JAX_COORDINATOR_ADDRESS: JOB-0.SUBDOMAIN of the headless service, or the
   label jobset.sigs.k8s.io/coordinator. A JobSet with several Jobs also needs JOBSET_JOB_INDEX and JOBSET_REPLICAS,
   from the labels jobset.sigs.k8s.io/job-index and jobset.sigs.k8s.io/replicatedjob-replicas.

In every row JAX_COORDINATOR_ADDRESS, JAX_COORDINATOR_PORT and JAX_LOCAL_DEVICE_IDS come before what the scheduler
tells. The processes of a host share its GPUs evenly, unless each sees only its own.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from jaxinfra.errors import ConfigError
from jaxinfra.plugins import load_plugin, plugins
from jaxinfra.processes import ray_train, schedulers, tpu_metadata
from jaxinfra.processes.schedulers import Environment

_PORT = 8476
_GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run, and which of them this one is.

    Attributes:
        coordinator: HOST:PORT of process 0.
        count: processes in the run, at least 2.
        index: of this process, from 0.
        local_devices: for `jax.distributed.initialize(local_device_ids=...)`; None for all that this process sees.
        source: what told us, for messages, such as "Slurm" or "--process-id".
        hosts: host of each process by index; () if the scheduler does not tell.
    """

    coordinator: str
    count: int
    index: int
    local_devices: tuple[int, ...] | None
    source: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Says where a scheduler tells what: the name of a variable, or a function of the environment if it takes more.

    A package adds one as an entry point of the group `jaxinfra.schedulers`.

    Attributes:
        source: name of the scheduler.
        mark: the variable that shows that it started this process.
        count: processes in the run.
        index: of this process.
        host: of process 0, with or without a port; by default the user has to name it.
        port: if `host` has none.
        hosts: of each process.
        local_count: processes on this host; None if they do not share its GPUs.
        local_index: of this process among them.
    """

    source: str
    mark: str | Callable[[Environment], bool]
    count: str | Callable[[Environment], int]
    index: str | Callable[[Environment], int]
    host: Callable[[Environment], str] = schedulers.named_coordinator
    port: int | Callable[[Environment], int] = _PORT
    hosts: Callable[[Environment], tuple[str, ...]] | None = None
    local_count: str | Callable[[Environment], int] | None = None
    local_index: str | Callable[[Environment], int] | None = None


_SCHEDULERS = (
    Scheduler(
        source="JAX_PROCESS_ID",
        mark="JAX_PROCESS_ID",
        count="JAX_NUM_PROCESSES",
        index="JAX_PROCESS_ID",
    ),
    Scheduler(
        source=ray_train.SOURCE,
        mark=ray_train.on_worker,
        count=lambda environment: ray_train.context().get_world_size(),
        index=lambda environment: ray_train.context().get_world_rank(),
        host=ray_train.address,
        local_count=lambda environment: ray_train.context().get_local_world_size(),
        local_index=lambda environment: ray_train.context().get_local_rank(),
    ),
    Scheduler(
        source="Open MPI",
        mark="OMPI_COMM_WORLD_SIZE",
        count="OMPI_COMM_WORLD_SIZE",
        index="OMPI_COMM_WORLD_RANK",
        host=schedulers.open_mpi_host,
        port=schedulers.open_mpi_port,
        local_count="OMPI_COMM_WORLD_LOCAL_SIZE",
        local_index="OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    Scheduler(
        source="MPICH",
        mark="MPI_LOCALRANKID",
        count="PMI_SIZE",
        index="PMI_RANK",
        host=schedulers.mpich_host,
        local_count="MPI_LOCALNRANKS",
        local_index="MPI_LOCALRANKID",
    ),
    Scheduler(
        source="Slurm",
        mark="SLURM_STEP_NUM_TASKS",
        count="SLURM_STEP_NUM_TASKS",
        index="SLURM_PROCID",
        host=schedulers.slurm_host,
        port=lambda environment: schedulers.port_of_job(schedulers.number(environment, "SLURM_JOB_ID")),
        hosts=schedulers.slurm_hosts,
        local_count=schedulers.slurm_local_count,
        local_index="SLURM_LOCALID",
    ),
    Scheduler(
        source="PMI",
        mark="PMI_SIZE",
        count="PMI_SIZE",
        index="PMI_RANK",
    ),
)
_MACHINES = (
    Scheduler(
        source="Cloud TPU",
        mark=schedulers.on_cloud_tpu,
        count=schedulers.tpu_count,
        index=schedulers.tpu_index,
        host=schedulers.tpu_host,
        port=8482,  # as JAX
        hosts=schedulers.tpu_hosts,
    ),
    Scheduler(
        source="Kubernetes",
        mark="JOB_COMPLETION_INDEX",
        count=schedulers.kubernetes_count,
        index=schedulers.kubernetes_index,
        host=schedulers.kubernetes_host,
        port=55527,  # as JAX
        hosts=schedulers.kubernetes_hosts,
    ),
)


def find_processes(
    environment: Environment,
    *,
    coordinator: str | None = None,
    process_id: int | None = None,
    of: int | None = None,
) -> Processes | None:
    """Returns the processes of this run, by the first row that matches (see above); None for a single one.

    Args:
        environment: of this process, such as `os.environ`.
        coordinator: HOST:PORT or HOST.
        process_id: index of this process.
        of: number of processes.

    Raises:
        ConfigError: settings are incomplete, impossible or contradict each other.
    """
    flags = {"--coordinator": coordinator, "--process-id": process_id, "--of": of}
    if coordinator is not None and process_id is not None and of is not None:
        _check_index("--process-id", of, process_id)
        address, devices = _with_port(coordinator, environment, _PORT), _listed_devices(environment)
        found = Processes(coordinator=address, count=of, index=process_id, local_devices=devices, source="--process-id")
        return found if of > 1 else None
    if given := [name for name, value in flags.items() if value is not None]:
        missing = " and ".join(name for name in flags if name not in given)
        raise ConfigError(
            f"{given[0]} {flags[given[0]]}: {missing} missing; use all of --coordinator HOST:PORT --process-id N --of N"
        )
    row = _first_match(_schedulers(), environment)
    if row is None:
        environment = {**environment, **tpu_metadata.read_variables(environment)}
        row = _first_match(_MACHINES, environment)
    if row is None:
        _require_no_rest(environment)
        return None
    return _read(row, environment)


def _schedulers() -> Iterator[Scheduler]:
    yield _SCHEDULERS[0]
    yield from (load_plugin("schedulers", name, Scheduler) for name in plugins("schedulers"))
    yield from _SCHEDULERS[1:]


def _first_match(rows: Iterable[Scheduler], environment: Environment) -> Scheduler | None:
    for row in rows:
        if row.mark(environment) if callable(row.mark) else row.mark in environment:
            return row
    return None


def _require_no_rest(environment: Environment) -> None:
    """Raises ConfigError if the process was told of others, but not which of them it is."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES")
    if environment.get("JAX_NUM_PROCESSES") != "1" and (given := [name for name in names if name in environment]):
        raise ConfigError(
            f"{given[0]}={environment[given[0]]}: JAX_PROCESS_ID is not set, nor any variable of a scheduler; "
            f"set JAX_PROCESS_ID, or unset {' and '.join(given)} for one process"
        )


def _read(row: Scheduler, environment: Environment) -> Processes | None:
    count = row.count(environment) if callable(row.count) else schedulers.number(environment, row.count)
    index = row.index(environment) if callable(row.index) else schedulers.number(environment, row.index)
    if "JAX_NUM_PROCESSES" in environment and (stated := schedulers.number(environment, "JAX_NUM_PROCESSES")) != count:
        raise ConfigError(
            f"JAX_NUM_PROCESSES={stated}: {row.source} started {count}; unset it, or set JAX_PROCESS_ID and "
            "JAX_COORDINATOR_ADDRESS, too"
        )
    _check_index(row.source, count, index)
    if count == 1:
        return None
    address = environment.get("JAX_COORDINATOR_ADDRESS") or row.host(environment)
    return Processes(
        coordinator=_with_port(address, environment, row.port),
        count=count,
        index=index,
        local_devices=_listed_devices(environment) or _own_devices(row, environment),
        source=row.source,
        hosts=row.hosts(environment) if row.hosts else (),
    )


def _check_index(source: str, count: int, index: int) -> None:
    if not 0 <= index < count:
        raise ConfigError(
            f"{source}: process {index} of {count} is impossible; processes count from 0 to {max(count - 1, 0)}"
        )


def _with_port(address: str, environment: Environment, default: int | Callable[[Environment], int]) -> str:
    """Returns HOST:PORT; if the address has no port, that of JAX_COORDINATOR_PORT or the default."""
    match = re.fullmatch(r"(?P<host>\[[\w:.%]+\]|[^][:\s/]+)(:(?P<port>\d+))?", address)
    if match and match["port"]:
        port = int(match["port"])
    elif environment.get("JAX_COORDINATOR_PORT"):
        port = schedulers.number(environment, "JAX_COORDINATOR_PORT")
    else:
        port = default(environment) if callable(default) else default
    if not match or not 0 < port < 2**16:
        raise ConfigError(
            f"coordinator {address!r}, port {port}: expected HOST or HOST:PORT of process 0, with a port that is free "
            f"there; use for example node1:{_PORT} or [fd00::1]:{_PORT}"
        )
    return f"{match['host']}:{port}"


def _listed_devices(environment: Environment) -> tuple[int, ...] | None:
    """Returns the ids of JAX_LOCAL_DEVICE_IDS, None without."""
    listed = environment.get("JAX_LOCAL_DEVICE_IDS")
    if not listed:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", listed):
        raise ConfigError(f"JAX_LOCAL_DEVICE_IDS={listed}: expected ids with commas between, such as 0,1")
    return tuple(map(int, listed.split(",")))


def _own_devices(row: Scheduler, environment: Environment) -> tuple[int, ...] | None:
    """Returns the share of this process in the GPUs of its host; one GPU if their number is unknown, as JAX does.

    None if the process has the host for itself, or sees fewer GPUs than the host has or than processes share it: then
    it sees only its own.
    """
    if row.local_count is None or row.local_index is None:
        return None
    number = schedulers.number
    count = row.local_count(environment) if callable(row.local_count) else number(environment, row.local_count)
    index = row.local_index(environment) if callable(row.local_index) else number(environment, row.local_index)
    _check_index(f"{row.source}, on this host", count, index)
    on_host = number(environment, "SLURM_GPUS_ON_NODE") if environment.get("SLURM_GPUS_ON_NODE") else count
    visible = on_host
    for name in _GPU_VARIABLES:
        if name in environment:
            visible = len([each for each in environment[name].split(",") if each.strip()])
            break
    if count == 1 or visible < count or visible < on_host:
        return None
    if visible % count:
        raise ConfigError(
            f"{row.source}: {count} processes cannot share the {visible} GPUs of a host evenly; "
            f"start {visible} on each host, or set JAX_LOCAL_DEVICE_IDS"
        )
    share = visible // count
    return tuple(range(index * share, (index + 1) * share))
