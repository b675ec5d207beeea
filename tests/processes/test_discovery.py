"""The environments are those that the schedulers set; `test_schedulers.py` starts real ones."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.processes import tpu_metadata
from jaxinfra.processes.discovery import Processes, find_processes
from tests.refusals import raises
from tests.servers.faulty_proxy import LocalServer, QuietHandler

JAX = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OPEN_MPI_5 = {
    **{name: value for name, value in OPEN_MPI_4.items() if "COMM_WORLD" in name},
    "OMPI_VERSION": "5.0.7",
    "PMIX_NAMESPACE": "prterun-gpu-01.cluster-17461@1",
    "PMIX_HOSTNAME": "gpu-02.cluster",
    "PMIX_SERVER_URI2": "prterun-gpu-01.cluster-17461@0.1;tcp4://10.0.0.2:50079",
}
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "host[1-2]",
}
RACK_NODES = [f"rack{rack}node{node}" for rack in (1, 2) for node in ("08", "10")]
SLURM_RACKS = {
    **SLURM,
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
    "SLURM_STEP_NODELIST": "rack[1-2]node[08,10],login",
}
SLURM_GPUS = {
    **SLURM,
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_GPUS_ON_NODE": "8",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
}
GKE = {"TPU_WORKER_HOSTNAMES": "train-0.svc,train-1.svc", "TPU_WORKER_ID": "1"}
GKE_SLICES = {
    **GKE,
    "MEGASCALE_COORDINATOR_ADDRESS": "train-slice-0-0.train:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
INDEXED_JOB = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "HOSTNAME": "train-1",
    "JOB_COMPLETION_INDEX": "1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_COORDINATOR_ADDRESS": "train-0.train",
}
JOB_SET = {
    **INDEXED_JOB,
    "HOSTNAME": "run-workers-1-1",
    "JAX_NUM_PROCESSES": "4",
    "JAX_COORDINATOR_ADDRESS": "run-workers-0-0.run:1234",
    "JOBSET_REPLICAS": "2",
    "JOBSET_JOB_INDEX": "1",
}
METADATA = {"agent-worker-number": "1", "worker-network-endpoints": "w-0:8470:10.0.0.1,w-1:8470:10.0.0.2"}


def found(
    source: str, coordinator: str, index: int, count: int, devices: tuple[int, ...] | None = None, *hosts: str
) -> Processes:
    return Processes(
        coordinator=coordinator, count=count, index=index, local_devices=devices, source=source, hosts=hosts
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (JAX, found("JAX_PROCESS_ID", "node0:1234", 3, 4)),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "node0"}, found("JAX_PROCESS_ID", "node0:8476", 3, 4)),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "[fd00::1]"}, found("JAX_PROCESS_ID", "[fd00::1]:8476", 3, 4)),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, found("JAX_PROCESS_ID", "node0:1234", 3, 4, (2, 3))),
        (OPEN_MPI_4, found("Open MPI", "10.96.0.1:62624", 3, 4, (1,))),
        (
            OPEN_MPI_4 | {"OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b,2620::2]:43370"},
            found("Open MPI", "[fe80::b9b]:62880", 3, 4, (1,)),
        ),
        (OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, found("Open MPI", "127.0.0.1:62624", 3, 4, (1,))),
        (OPEN_MPI_5, found("Open MPI", "gpu-01.cluster:62517", 3, 4, (1,))),
        (OPEN_MPI_5 | {"JAX_COORDINATOR_ADDRESS": "node0"}, found("Open MPI", "node0:62517", 3, 4, (1,))),
        (MPICH, found("MPICH", "127.0.0.1:8476", 1, 2, (1,))),
        (MPICH | {"JAX_COORDINATOR_PORT": "1234"}, found("MPICH", "127.0.0.1:1234", 1, 2, (1,))),
        (SLURM, found("Slurm", "host1:61441", 2, 3, None, "host1", "host1", "host2")),
        (
            SLURM_RACKS,
            found("Slurm", "rack1node08:61441", 2, 5, None, *RACK_NODES, "login"),
        ),
        (SLURM_GPUS, found("Slurm", "host1:61441", 3, 4, (4, 5, 6, 7), *["host1"] * 2, *["host2"] * 2)),
        (
            SLURM | {"SLURM_DISTRIBUTION": "cyclic:block"},
            found("Slurm", "host1:61441", 2, 3, None, "host1", "host2", "host1"),
        ),
        (SLURM | {"SLURM_DISTRIBUTION": "plane"}, found("Slurm", "host1:61441", 2, 3)),
        (
            {"PMI_SIZE": "8", "PMI_RANK": "5", "PALS_LOCAL_RANKID": "1", "JAX_COORDINATOR_ADDRESS": "nid1"},
            found("PMI", "nid1:8476", 5, 8),
        ),
        (GKE, found("Cloud TPU", "train-0.svc:8482", 1, 2, None, "train-0.svc", "train-1.svc")),
        (
            {"TPU_PROCESS_ADDRESSES": "10.0.0.1:8471,10.0.0.2:8471", "TPU_WORKER_ID": "0"},
            found("Cloud TPU", "10.0.0.1:8482", 0, 2, None, "10.0.0.1", "10.0.0.2"),
        ),
        (GKE_SLICES, found("Cloud TPU", "train-slice-0-0.train:8482", 3, 4)),
        (
            GKE_SLICES | {"TPU_WORKER_HOSTNAMES": "localhost"},
            found("Cloud TPU", "train-slice-0-0.train:8482", 1, 2),
        ),
        (INDEXED_JOB, found("Kubernetes", "train-0.train:55527", 1, 2, None, "train-0.train", "train-1.train")),
        (
            JOB_SET,
            found(
                "Kubernetes",
                "run-workers-0-0.run:1234",
                3,
                4,
                None,
                *(f"run-workers-{job}-{pod}.run" for job in (0, 1) for pod in (0, 1)),
            ),
        ),
    ],
)
def test_each_scheduler_tells_its_processes(environment: Mapping[str, str], expected: Processes) -> None:
    assert find_processes(environment) == expected


@pytest.mark.parametrize(
    ("environment", "source"),
    [
        (JAX | OPEN_MPI_5 | SLURM | GKE | INDEXED_JOB | {"JAX_NUM_PROCESSES": "4"}, "JAX_PROCESS_ID"),
        (OPEN_MPI_5 | SLURM | GKE, "Open MPI"),  # mpirun in a Slurm job: one task a host
        (MPICH | SLURM, "MPICH"),
        (SLURM | {"PMI_SIZE": "3", "PMI_RANK": "2"}, "Slurm"),  # srun --mpi=pmi2
        (SLURM | {"PMIX_NAMESPACE": "slurm.pmix.10.0", "PMIX_RANK": "2"}, "Slurm"),  # srun --mpi=pmix
        (GKE_SLICES | {"JOB_COMPLETION_INDEX": "1", "JOBSET_JOB_INDEX": "1"}, "Cloud TPU"),
    ],
)
def test_what_started_the_process_comes_before_where_it_runs(environment: Mapping[str, str], source: str) -> None:
    processes = find_processes(environment)
    assert processes is not None and processes.source == source


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"JAX_NUM_PROCESSES": "1"},
        {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_NODELIST": "host[1-2]"},  # sbatch
        OPEN_MPI_5 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        MPICH | {"PMI_SIZE": "1", "PMI_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_SKIP_MDS_QUERY": "1"},
        {"TPU_WORKER_HOSTNAMES": "could not find any hosts, is this a TPU?"},
        GKE | {"JAX_PLATFORMS": "cpu"},
        INDEXED_JOB | {"JAX_NUM_PROCESSES": "1", "JOB_COMPLETION_INDEX": "7"},  # each pod trains a run of its own
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "notebook-0"},
    ],
)
def test_one_process_joins_none(environment: Mapping[str, str]) -> None:
    assert find_processes(environment) is None


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        (SLURM_GPUS | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, None),  # --gpus-per-task=4: each sees only its own
        (SLURM_GPUS | {"SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}, None),
        (MPICH | {"CUDA_VISIBLE_DEVICES": "0"}, None),
        (MPICH | {"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),
        (MPICH, (1,)),
    ],
)
def test_processes_of_a_host_share_its_gpus(environment: Mapping[str, str], devices: tuple[int, ...] | None) -> None:
    processes = find_processes(environment)
    assert processes is not None and processes.local_devices == devices


def without(environment: Mapping[str, str], name: str) -> dict[str, str]:
    return {each: value for each, value in environment.items() if each != name}


ALL_OF_JAX = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("environment", "named", "fix"),
    [
        (without(JAX, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES", {"JAX_NUM_PROCESSES": "4"}),
        (without(JAX, "JAX_PROCESS_ID"), "JAX_PROCESS_ID JAX_COORDINATOR_ADDRESS", {"JAX_PROCESS_ID": "3"}),
        (without(JAX, "JAX_COORDINATOR_ADDRESS"), "JAX_COORDINATOR_ADDRESS", {"JAX_COORDINATOR_ADDRESS": "h:1"}),
        (JAX | {"JAX_PROCESS_ID": "4"}, "4 JAX_PROCESS_ID", {"JAX_PROCESS_ID": "3"}),
        (JAX | {"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID=-1", {"JAX_PROCESS_ID": "3"}),
        (JAX | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four", {"JAX_NUM_PROCESSES": "4"}),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "http://h:1"}, "http://h:1 HOST:PORT", {"JAX_COORDINATOR_ADDRESS": "h:1"}),
        (JAX | {"JAX_COORDINATOR_ADDRESS": "h:70000"}, "70000", {"JAX_COORDINATOR_ADDRESS": "h:7000"}),
        (JAX | {"JAX_LOCAL_DEVICE_IDS": "all"}, "JAX_LOCAL_DEVICE_IDS", {"JAX_LOCAL_DEVICE_IDS": "0"}),
        (SLURM | {"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2 Slurm 3", ALL_OF_JAX),
        (without(OPEN_MPI_5, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK", {"OMPI_COMM_WORLD_RANK": "3"}),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": "0"}, "gpu-01 gpu-02", {"JAX_COORDINATOR_ADDRESS": "gpu-02:8476"}),
        (without(OPEN_MPI_5, "PMIX_NAMESPACE"), "JAX_COORDINATOR_ADDRESS", {"JAX_COORDINATOR_ADDRESS": "h:1"}),
        (
            MPICH | {"MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"},
            "JAX_COORDINATOR_ADDRESS",
            {"JAX_COORDINATOR_ADDRESS": "h:1"},
        ),
        (MPICH | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, "JAX_LOCAL_DEVICE_IDS 3", {"JAX_LOCAL_DEVICE_IDS": "1"}),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_NODELIST", {"SLURM_NODELIST": "host[1-2]"}),
        (SLURM | {"SLURM_STEP_NODELIST": "host1,,host2"}, "SLURM_STEP_NODELIST", ALL_OF_JAX),
        (SLURM | {"SLURM_STEP_NODELIST": "host[1-2"}, "SLURM_STEP_NODELIST", ALL_OF_JAX),
        (SLURM | {"SLURM_STEP_NODELIST": "host1"}, "SLURM_STEP_NODELIST", ALL_OF_JAX),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2,2"}, "SLURM_STEP_TASKS_PER_NODE", ALL_OF_JAX),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x"}, "SLURM_STEP_TASKS_PER_NODE", ALL_OF_JAX),
        (SLURM | {"SLURM_NODEID": "2"}, "SLURM_NODEID", ALL_OF_JAX),
        (SLURM | {"SLURM_DISTRIBUTION": "arbitrary"}, "SLURM_DISTRIBUTION", {"JAX_COORDINATOR_ADDRESS": "host2"}),
        (GKE | {"TPU_WORKER_ID": "2"}, "TPU_WORKER_ID", {"TPU_WORKER_ID": "1"}),
        (without(GKE, "TPU_WORKER_ID"), "TPU_WORKER_ID", {"TPU_WORKER_ID": "1"}),
        (GKE | {"TPU_WORKER_HOSTNAMES": "a,,b"}, "TPU_WORKER_HOSTNAMES", {"TPU_WORKER_HOSTNAMES": "a,b"}),
        (without(GKE_SLICES, "MEGASCALE_SLICE_ID"), "MEGASCALE_SLICE_ID", {"MEGASCALE_SLICE_ID": "1"}),
        (GKE_SLICES | {"MEGASCALE_SLICE_ID": "2"}, "Cloud TPU 5", {"MEGASCALE_SLICE_ID": "1"}),
        (
            without(GKE_SLICES, "MEGASCALE_COORDINATOR_ADDRESS"),
            "MEGASCALE_COORDINATOR_ADDRESS",
            {"MEGASCALE_COORDINATOR_ADDRESS": "h"},
        ),
        (without(INDEXED_JOB, "JAX_NUM_PROCESSES"), "JAX_NUM_PROCESSES", {"JAX_NUM_PROCESSES": "2"}),
        (without(INDEXED_JOB, "JAX_COORDINATOR_ADDRESS"), "train-0.", {"JAX_COORDINATOR_ADDRESS": "train-0.train"}),
        (INDEXED_JOB | {"JOB_COMPLETION_INDEX": "2"}, "Kubernetes 2", {"JAX_NUM_PROCESSES": "3"}),
        (without(JOB_SET, "JOBSET_JOB_INDEX"), "JOBSET_JOB_INDEX job-index", {"JOBSET_JOB_INDEX": "1"}),
        (JOB_SET | {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX", {"JAX_NUM_PROCESSES": "6"}),
        (JOB_SET | {"JAX_NUM_PROCESSES": "5"}, "JAX_NUM_PROCESSES JOBSET_REPLICAS", {"JAX_NUM_PROCESSES": "4"}),
        (JOB_SET | {"JOBSET_REPLICAS": "0"}, "JOBSET_REPLICAS", {"JOBSET_REPLICAS": "2"}),
    ],
)
def test_incomplete_or_impossible_settings_are_refused(
    environment: Mapping[str, str], named: str, fix: Mapping[str, str]
) -> None:
    with raises(ConfigError, named):
        find_processes(environment)
    assert find_processes({**environment, **fix}) is not None


def test_flags_come_first() -> None:
    processes = find_processes(JAX, coordinator="host:1234", process_id=3, of=16)
    assert processes == found("--process-id", "host:1234", 3, 16)
    assert find_processes(SLURM, coordinator="host:1234", process_id=0, of=1) is None
    with raises(ConfigError, "--of"):
        find_processes(JAX, coordinator="host:1234", process_id=3)
    with raises(ConfigError, "--coordinator --process-id"):
        find_processes({}, of=16)
    with raises(ConfigError, "--process-id 16"):
        find_processes({}, coordinator="host:1234", process_id=16, of=16)
    with raises(ConfigError, "HOST:PORT"):
        find_processes({}, coordinator="", process_id=1, of=16)


def test_hosts_of_a_tpu_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "addresses"
    environment = {**GKE, "TPU_PROCESS_ADDRESSES_PATH": str(path)}
    with raises(ConfigError, "TPU_PROCESS_ADDRESSES_PATH"):
        find_processes(environment)
    path.write_text("10.0.0.1:8471,10.0.0.2:8471\n")
    assert find_processes(environment) == found("Cloud TPU", "10.0.0.1:8482", 1, 2, None, "10.0.0.1", "10.0.0.2")


class MetadataServer(LocalServer):
    def __init__(self, attributes: Mapping[str, str], failures: int):
        super().__init__(MetadataHandler)
        self.attributes = attributes
        self.failures = failures


class MetadataHandler(QuietHandler):
    server: MetadataServer

    def do_GET(self) -> None:
        folder, _, name = self.path.rpartition("/")
        known = folder == "/computeMetadata/v1/instance/attributes" and name in self.server.attributes
        status = 200 if known else 404
        if self.headers["Metadata-Flavor"] != "Google":
            status = 403
        elif self.server.failures:
            self.server.failures -= 1
            status = 503
        self.send_response(status)
        self.end_headers()
        if status == 200:
            self.wfile.write(self.server.attributes[name].encode())


@contextmanager
def tpu_vm(attributes: Mapping[str, str], failures: int = 0) -> Iterator[dict[str, str]]:
    """The environment of a TPU VM, whose metadata server answers inside the block after some failures."""
    with MetadataServer(attributes, failures) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield {"JAX_FORCE_TPU_INIT": "1", "GCE_METADATA_HOST": f"127.0.0.1:{server.server_port}"}
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_metadata, "_PAUSE_S", 0.0)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (METADATA, found("Cloud TPU", "10.0.0.1:8482", 1, 2, None, "10.0.0.1", "10.0.0.2")),
        (
            {"agent-worker-number": "0\n", "worker-network-endpoints": "w-0,w-1,w-2\n"},
            found("Cloud TPU", "w-0:8482", 0, 3, None, "w-0", "w-1", "w-2"),
        ),
        (
            METADATA
            | {
                "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.1.1:8080'\n"
                "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
            },
            found("Cloud TPU", "10.0.1.1:8482", 3, 4),
        ),
        (METADATA | {"worker-network-endpoints": "w-0:8470:10.0.0.1", "agent-worker-number": "0"}, None),
        ({}, None),  # a machine of Google's cloud, but no TPU VM
    ],
)
def test_a_tpu_vm_asks_its_metadata_server(attributes: Mapping[str, str], expected: Processes | None) -> None:
    with tpu_vm(attributes, failures=2) as environment:
        assert find_processes(environment) == expected
        assert find_processes({**environment, "TPU_SKIP_MDS_QUERY": "1"}) is None
        assert find_processes({**environment, "JAX_PLATFORMS": "cpu"}) is None
        assert find_processes({**environment, **GKE}) == find_processes(GKE)


@pytest.mark.parametrize(
    ("attributes", "failures", "named"),
    [
        (without(METADATA, "worker-network-endpoints"), 0, "worker-network-endpoints TPU_WORKER_HOSTNAMES"),
        (METADATA | {"worker-network-endpoints": "a:b"}, 0, "worker-network-endpoints TPU_WORKER_HOSTNAMES"),
        (METADATA | {"agent-worker-number": "2"}, 0, "TPU_WORKER_ID=2"),
        (METADATA, 100, "503 TPU_SKIP_MDS_QUERY=1"),
    ],
)
def test_a_tpu_vm_refuses_metadata_without_sense(attributes: Mapping[str, str], failures: int, named: str) -> None:
    with tpu_vm(attributes, failures) as environment, raises(ConfigError, named):
        find_processes(environment)


def test_a_tpu_vm_refuses_to_go_on_alone_without_its_metadata_server() -> None:
    with tpu_vm(METADATA) as environment:
        pass
    with raises(ConfigError, environment["GCE_METADATA_HOST"], "TPU_SKIP_MDS_QUERY=1"):
        find_processes(environment)


def test_jax_is_not_imported() -> None:
    program = "import sys; import jaxinfra.processes.discovery; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
