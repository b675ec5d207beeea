"""Real schedulers on this machine: what `find_processes` finds, and a run of two processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.servers.guard import free_ports, wait_until
from tests.servers.slurm import PROGRAMS, slurm
from tests.tiny_run import Tiny, summary
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

PAGE = (ROOT / "docs/run-on.md").read_text()
START_S = 240  # a job that is queued again waits for Slurm's scheduler, too
LONG = ("train.steps=100000", "train.eval_every=none", "track.tensorboard=false")
PROGRAM = (sys.executable, "-m", "tests.processes.joins")
MPIRUN = ("mpirun.openmpi", "--allow-run-as-root", "-n", "2")


def needs(package: str, *programs: str) -> pytest.MarkDecorator:
    missing = [program for program in programs if not shutil.which(program)]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' '.join(missing)}: apt-get install {package}")


def started(*command: str, environment: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Returns what each process printed, by index."""
    variables = {**(environment or os.environ), "JAX_NUM_CPU_DEVICES": "2"}
    variables |= {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo", "PYTHONPATH": str(ROOT)}
    del variables["XLA_FLAGS"]  # they are for eight devices
    ended = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]  # gloo prints, too
    return sorted(found, key=lambda each: each["index"])


def assert_trains(tiny: Tiny, name: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
    """The same command, started by a scheduler in two processes, is one run."""
    launch = (sys.executable, "-m", "launch", str(tiny.config), f"name={name}", "train.steps=3")
    more = ("optim.schedule.warmup_steps=1", "--devices", "cpu:1")
    started(*command, *launch, *more, environment=environment)
    record = json.loads((tiny.directory(name) / "run.json").read_text())
    assert (record["devices"]["processes"], record["devices"]["count"]) == (2, 2)
    assert summary(tiny.directory(name))["steps"] == 3


def assert_joined(found: list[dict[str, Any]]) -> None:
    """Two processes with two devices each added up the same array."""
    assert [each["joined_as"] for each in found] == [each["index"] for each in found] == [0, 1]
    assert {(each["sum"], each["devices"], each["local"]) for each in found} == {(6, 4, 2)}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


@pytest.mark.slow(3)
@needs("slurmctld slurmd slurm-client munge", *PROGRAMS)
class TestSlurm:
    def test_tasks_of_a_node_join_where_jax_looks_for_the_coordinator(self, cluster: Mapping[str, str]) -> None:
        found = started("srun", "-N", "1", "-n", "2", *PROGRAM, "--join", "--detect", environment=cluster)
        assert_joined(found)
        assert [each["local_devices"] for each in found] == [[0], [1]]
        assert all(each["hosts"] == ["127.0.0.1", "127.0.0.1"] for each in found)

    def test_tasks_of_two_nodes_train(self, cluster: Mapping[str, str], tiny: Tiny) -> None:
        assert_trains(tiny, "slurm", "srun", "-N", "2", "-n", "2", environment=cluster)

    @pytest.mark.parametrize(("distribution", "nodes"), [("block", [1, 1, 2]), ("cyclic", [1, 2, 1]), ("plane=1", [])])
    def test_tasks_know_the_hosts_of_all(self, cluster: Mapping[str, str], distribution: str, nodes: list[int]) -> None:
        found = started("srun", "-N", "2", "-n", "3", f"--distribution={distribution}", *PROGRAM, environment=cluster)
        assert [each["index"] for each in found] == [0, 1, 2]
        assert all(each["count"] == 3 and each["coordinator"].startswith("127.0.0.1:") for each in found)
        assert all(each["hosts"] == [f"127.0.0.{node}" for node in nodes] for each in found)

    @pytest.mark.slow(40)
    def test_the_script_of_the_page_starts_again(self, cluster: Mapping[str, str], tiny: Tiny, tmp_path: Path) -> None:
        """After SIGTERM, and after a process was killed, the job is queued again and resumes."""
        (script,) = re.findall(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
        words = (str(tiny.config), "name=job", "mesh.fsdp=2", *LONG)
        script = re.sub(r"srun (.*) configs/story.py .*", rf"srun \1 {' '.join(words)} --devices cpu:1", script)
        script = re.sub(r"--nodes=4(.*) --gpus-per-node=8 --cpus-per-task=32 --time=\S+", r"--nodes=2\1", script)
        (tmp_path / "story.sh").write_text(script)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # as an activated environment sets it
        environment = {**cluster, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        log = tmp_path / "job.out"

        def slurm(*command: str) -> str:
            return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout

        def trained(start: int) -> None:
            printed = re.split(r"^(?:new run|resuming) ", log.read_text(), flags=re.MULTILINE)[start]
            assert len(re.findall(r"^step ", printed, re.MULTILINE)) > 9

        def ended() -> None:
            assert not slurm("squeue", "--noheader")

        job = slurm("sbatch", "--parsable", f"--output={log}", str(tmp_path / "story.sh")).strip()
        try:
            wait_until(lambda: trained(1), (AssertionError, IndexError, OSError), log, START_S)
            slurm("scancel", "--signal=TERM", job)
            wait_until(lambda: trained(2), (AssertionError, IndexError), log, START_S)
            (lease,) = (tiny.directory("job") / "lease").glob("*.json")
            os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
            wait_until(lambda: trained(3), (AssertionError, IndexError), log, START_S)
        finally:
            for command in (("scancel", "--full", "--signal=KILL", job), ("scancel", job)):
                subprocess.run(command, env=environment, check=False)  # fails where the job has ended already
            wait_until(ended, (AssertionError,), log)  # else its processes outlive the cluster


@pytest.mark.slow(3)
@needs("openmpi-bin", "mpirun.openmpi")
class TestOpenMpi:
    def test_ranks_of_one_host_join_on_loopback(self) -> None:
        found = started(*MPIRUN, "--oversubscribe", *PROGRAM, "--join")
        assert_joined(found)
        assert {each["coordinator"].partition(":")[0] for each in found} == {"127.0.0.1"}
        assert [each["local_devices"] for each in found] == [[0], [1]]

    def test_ranks_train(self, tiny: Tiny) -> None:
        assert_trains(tiny, "mpi", *MPIRUN, "--oversubscribe")

    def test_ranks_of_several_hosts_meet_on_the_host_of_mpirun(self, tmp_path: Path) -> None:
        agent = tmp_path / "agent"  # in place of ssh: runs the command of another host here
        agent.write_text('#!/bin/sh\nshift\nexec sh -c "$*"\n')
        agent.chmod(0o755)
        settings = ("--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_do_not_resolve", "1")
        found = started(*MPIRUN, *settings, "--host", "a:1,b:1", *PROGRAM)
        assert [each["index"] for each in found] == [0, 1]
        assert [each["local_devices"] for each in found] == [None, None]
        (coordinator,) = {each["coordinator"] for each in found}
        assert coordinator.partition(":")[0].split(".")[0] == socket.gethostname().split(".")[0]


@pytest.mark.slow(2)
@needs("mpich", "mpiexec.hydra")
def test_ranks_of_mpich_meet_on_loopback() -> None:
    (port,) = free_ports(1)
    environment = {**os.environ, "JAX_COORDINATOR_PORT": str(port)}
    found = started("mpiexec.hydra", "-n", "2", *PROGRAM, environment=environment)
    assert [(each["index"], each["local_devices"]) for each in found] == [(0, [0]), (1, [1])]
    assert {(each["count"], each["coordinator"]) for each in found} == {(2, f"127.0.0.1:{port}")}
