"""What a place is: the verbs by which a run gets to machines elsewhere, and what it is told about them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

CLOUDS = ("tpu-vm", "gce")
KINDS = ("ssh", "slurm", "k8s", "ray", *CLOUDS)
Say = Callable[[str], None]
"""Prints one line for the user."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where a run is to go, as the command line says it; recorded in the run directory, so it holds no secret."""

    kind: str  # of `KINDS`
    # Of ssh: in the order of ranks, as ssh takes them. Of Slurm: a login node; () is this machine.
    hosts: tuple[str, ...] = ()
    nodes: int = 0  # of Slurm
    sbatch: tuple[str, ...] = ()  # more options of sbatch, a word each
    address: str = ""  # of the dashboard of a Ray cluster, "" before it is known
    # Of Kubernetes and Ray. Chips are those of `--on`, or cpu:N for N pods or workers without any.
    accelerator: str = ""
    # Of Kubernetes.
    workload: str = "jobset"  # job, jobset or trainjob
    context: str = ""  # of the kubeconfig; "" is the current one
    namespace: str = ""  # "" before it is known
    queue: str = ""  # of Kueue; "" starts at once
    priority: str = ""  # of Kueue
    topology: str = ""  # label of nodes within one of whose values pods should be, by Kueue
    volumes: tuple[str, ...] = ()  # CLAIM:PATH
    node_selector: tuple[str, ...] = ()  # LABEL=VALUE
    workdir: str = ""  # folder of the hosts for code and packages; "" is ~/.cache/jaxinfra
    name: str = ""  # of the cloud's resource
    project: str = ""  # of the cloud; "" before it is known
    zone: str = ""
    create: str = ""  # the chips to make, as of `--on`: v6e-64, 2xv5e:4x4; "" takes the resource that exists
    spot: bool = False
    reservation: str = ""
    image: str = ""  # TPU runtime version, or image of Compute Engine, "" is that of the table; or of containers
    service_account: str = ""  # email, or name in the namespace; "" is the default one of the project, or none
    network: str = ""  # "" is `default`
    internal_ips: bool = False  # make hosts without public addresses, and connect to their private ones
    user: str = ""  # user on hosts of a cloud; "" is that of the launching machine
    ssh_key: str = ""  # private key for hosts of a cloud; "" is ~/.ssh/google_compute_engine, as of gcloud
    wait_hours: float = 24.0  # the longest wait for capacity
    max_hours: float = 0.0  # after which the run is stopped and what was made is deleted; 0 is no limit

    @property
    def shares_disks(self) -> bool:
        """Whether a run directory may be on a disk, which the hosts share and this machine reaches."""
        return self.kind in ("ssh", "slurm", "ray")

    @property
    def is_cloud(self) -> bool:
        """Whether hosts have disks of their own, boot, and may be deleted."""
        return self.kind in CLOUDS


@dataclass(frozen=True, kw_only=True)
class Host:
    """A machine that ssh reaches."""

    address: str  # as ssh takes it: [USER@]NAME; "" is this machine, without ssh
    name: str = ""  # for people; "" is the address
    internal: str = ""  # the address by which the other hosts reach it; "" asks the host
    slice: int = 0  # of TPUs
    key_name: str = ""  # by which ssh keeps its key; addresses of a cloud are used again for other machines

    def __str__(self) -> str:
        return self.name or self.address or "this machine"


@dataclass(frozen=True, kw_only=True)
class HostState:
    """What one host says about the run."""

    attempt: int
    state: str  # none, live, ended, killed (without an exit code, as by a boot), or away (no answer)
    code: int | None = None  # exit code, if it has ended


@dataclass(frozen=True)
class Request:
    """A request to a cloud that `--dry-run` shows."""

    method: str  # such as POST
    url: str
    why: str
    body: str = ""  # JSON


@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something that exists in a project with this project's label."""

    kind: str  # such as "queued resource", "managed instance group"
    name: str
    run: str  # directory of the run that made it; "" if unknown
    zone: str
    state: str  # in the cloud's words
    chips: str  # such as v6e-64 or tpu7x:4x4x4; "" if unknown
    spot: bool
    created: str  # RFC 3339
    notice: str = ""  # planned maintenance and the like


class HostSource(ABC):
    """Where hosts come from: a list, or a cloud's API; most methods are those of a list here.

    All methods may be called again, also by another machine after the first was lost: what exists is taken, and nothing
    is made twice. Errors of a cloud are ConfigError (81: refused, with the fix) or StorageError (82: no answer).
    """

    options: PlaceOptions
    """With what the environment of this machine has added, such as project and user: what another machine needs."""

    def acquire(self, say: Say, go_on: Callable[[], bool] = lambda: True) -> Sequence[Host]:
        """Finds or makes the hosts, waits until they are ready, and returns them by rank.

        What was preempted or failed is deleted and made again. `say` gets a line whenever the wait changes. `go_on` is
        asked again and again: once it is False, what was made for this run is deleted, and Preempted is raised.
        """
        return self.current()

    @abstractmethod
    def current(self) -> Sequence[Host]:
        """Returns the hosts that exist, by rank, which let this machine in; makes and waits for nothing."""

    def lost(self) -> str:
        """Returns why the hosts have to be made again, such as "preempted"; "" while they stand, or may come back."""
        return ""

    @abstractmethod
    def release(self, say: Say) -> None:
        """Deletes what was made for this run, and nothing else; a line for each resource that is gone."""

    def requests(self) -> Sequence[Request]:
        """Returns what would be sent from the start to the end of a run if nothing exists yet."""
        return ()

    def deletion(self) -> Sequence[str]:
        """Returns the URLs that delete what was made for this run, for the host's own service account.

        () if nothing was made: the host then only stops the run at its deadline.
        """
        return ()
