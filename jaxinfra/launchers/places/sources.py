"""Finds the source of hosts for a kind of place, and how ssh reaches what it yields."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import override

from jaxinfra.errors import ConfigError, quoted
from jaxinfra.launchers.places.base import Place
from jaxinfra.launchers.places.job import Job, run_id
from jaxinfra.launchers.places.manifests import pods_of
from jaxinfra.launchers.places.place import Host, HostSource, PlaceOptions, Say
from jaxinfra.launchers.places.slurm import SlurmPlace, num_gpus
from jaxinfra.launchers.places.ssh import Ssh
from jaxinfra.launchers.places.ssh_place import SshPlace

_ADDRESS = re.compile(r"(?:[\w.][\w.-]*@)?[\w.\[:][\w.:%\]-]*")
KNOWN_HOSTS = Path.home() / ".cache" / "jaxinfra" / "places" / "known_hosts"


class HostList(HostSource):
    """Hosts that exist, by name, or this machine; nothing is made or deleted."""

    def __init__(self, options: PlaceOptions) -> None:
        """Raises ConfigError for a host that stands there twice, or that is no name of one."""
        self.options, addresses = options, options.hosts
        if wrong := [each for each in addresses if not _ADDRESS.fullmatch(each)]:
            raise ConfigError(f"--hosts: {quoted(wrong[0])} is no host; use [USER@]NAME[,...], as ssh takes them")
        if twice := sorted({each for each in addresses if addresses.count(each) > 1}):
            raise ConfigError(f"--hosts: {twice[0]} stands there twice; name each host once, in the order of ranks")
        self._hosts = [Host(address=address) for address in addresses or ("",)]

    @override
    def current(self) -> Sequence[Host]:
        return self._hosts

    @override
    def release(self, say: Say) -> None:
        """Does nothing: hosts of a list were not made here."""


def source_of(options: PlaceOptions, location: str) -> HostSource:
    """Returns where the hosts of a run come from; raises ConfigError if the options do not fit the kind."""
    if options.kind == "tpu-vm":
        from jaxinfra.launchers.places.tpu_vm import TpuVm  # an extra has its packages

        return TpuVm(options, location)
    if options.kind == "gce":
        from jaxinfra.launchers.places.gce import Gce

        return Gce(options, location)
    return HostList(options)


@dataclass(frozen=True, kw_only=True)
class Chips:
    """What the packages of hosts depend on."""

    arch: str  # as `uname -m` says it
    devices: int = 0  # of JAX, on all hosts; 0 if unknown
    extras: Sequence[str]  # of jaxinfra, for the chips


def chips_made(options: PlaceOptions) -> Chips | None:
    """Returns what hosts will have that are to be made; None for hosts that exist, which are asked."""
    if not options.create:
        return None
    from jaxinfra.launchers.places.images import topology_of  # imports JAX

    topology = topology_of(options.create)
    extra = "tpu" if topology.chip.platform == "tpu" else "cuda"
    return Chips(arch="x86_64", devices=topology.num_devices, extras=(extra,))


def num_devices(options: PlaceOptions) -> int:
    """Returns the devices that JAX will have on hosts that exist, as far as the options say it; else 0."""
    return pods_of(options).devices if options.accelerator else num_gpus(options)


def place_of(job: Job, say: Say) -> Place:
    """Returns the place of a job; nothing is asked or connected yet."""
    if job.place.kind == "k8s":
        from jaxinfra.launchers.places.k8s import Cluster, KubernetesPlace  # an extra has its packages

        return KubernetesPlace(Cluster(job.place), say)
    if job.place.kind == "ray":
        from jaxinfra.launchers.places.ray_jobs import RayCluster, RayPlace  # so has this one's

        return RayPlace(RayCluster(job.place), say)
    source, options, known = source_of(job.place, job.location), list[str](), None
    if job.place.is_cloud:
        from jaxinfra.launchers.places.google_cloud import key_of

        # Addresses are used again for other machines, so each run has its own file of known hosts.
        known = KNOWN_HOSTS / run_id(job.location)
        options = ["-i", str(key_of(job.place)), "-o", "IdentitiesOnly=yes"]
        options += ["-o", "StrictHostKeyChecking=accept-new"]
    kind = SlurmPlace if job.place.kind == "slurm" else SshPlace
    return kind(source, Ssh(workdir=job.place.workdir, options=options, known_hosts=known), say)
