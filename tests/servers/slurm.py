"""A Slurm cluster of two nodes with two CPUs each, on loopback, without systemd and cgroups.

Addresses are the nodes' names, so that processes reach each other by them.
"""

import getpass
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.servers.guard import free_ports, guarded, wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun")
NODES = ("127.0.0.1", "127.0.0.2")  # SLURM_NODELIST=127.0.0.[1-2]
_CONFIG = """\
ClusterName=tests
FirstJobId={port}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SchedulerParameters=sched_interval=2
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
NodeName={nodes} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports} CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF
"""


@contextmanager
def slurm(folder: Path) -> Iterator[Mapping[str, str]]:
    """A cluster inside the block: the environment in which srun, sbatch and others find it."""
    port, *node_ports = free_ports(1 + len(NODES))
    config, key = folder / "slurm.conf", folder / "munge.key"
    values = {"nodes": ",".join(NODES), "ports": ",".join(map(str, node_ports))}
    config.write_text(_CONFIG.format(port=port, user=getpass.getuser(), folder=folder, **values))
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    # --force: the folder of tests is not open to other users, whom munged would serve.
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munged += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    log = folder / "slurmctld.out"

    def all_idle() -> None:
        command = ["sinfo", "--noheader", "--partition=all", "--Node", "--format=%T"]
        states = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        if states != ["idle"] * len(NODES):
            raise OSError(f"nodes are {states}")

    with ExitStack() as servers:
        servers.enter_context(guarded(munged, folder / "munged.out"))
        wait_until((folder / "munge.socket").stat, (OSError,), folder / "munged.out")
        servers.enter_context(guarded(["slurmctld", "-D", "-f", str(config)], log))
        for node in NODES:
            command = ["slurmd", "-D", "-f", str(config), "-N", node]
            servers.enter_context(guarded(command, folder / f"slurmd-{node}.out"))
        wait_until(all_idle, (OSError, subprocess.CalledProcessError), log)
        yield environment
