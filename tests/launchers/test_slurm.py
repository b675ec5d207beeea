"""Runs as jobs of Slurm: real slurmctld and slurmd on this machine, a login node that sshd reaches, real uv."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cloud.laptop import Laptop, power_off, until
from tests.cloud.packages import PackageServer
from tests.launchers.ssh_hosts import SshHosts, ssh_hosts
from tests.processes.test_schedulers import needs
from tests.servers.slurm import NODES, PROGRAMS, slurm
from tests.tiny_run import Tiny

pytestmark = [pytest.mark.slow(40), needs("slurmctld slurmd slurm-client munge", *PROGRAMS)]


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A cluster, its login node, and what is installed there."""

    login: SshHosts
    cluster: Mapping[str, str]
    packages: Mapping[str, str]

    def laptop(self, tiny: Tiny) -> Laptop:
        """Returns the machine of a user, whose checkout has one commit; Slurm's commands also find the cluster here."""
        environment = {**self.cluster, **self.packages, "JAXINFRA_SSH": self.login.ssh}
        laptop = Laptop(self.login.folder / tiny.config.parent.name, environment, project=tiny.config.parent)
        (laptop.project / ".gitignore").write_text("runs\n*.log\n")
        laptop.commit()
        return laptop

    def place(self, *more: str) -> list[str]:
        """Returns the options of a start."""
        words = ["--place", "slurm", "--nodes", str(len(NODES)), "--devices", "cpu:1", *more]
        words += ["--workdir", f"{self.login.folder}/workdir"]
        environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "UV_LINK_MODE": "symlink", **self.packages}
        environment |= {"UV_CACHE_DIR": f"{self.login.folder}/uv", "PYTHONPYCACHEPREFIX": f"{self.login.folder}/pyc"}
        return [*words, *(word for each in environment.items() for word in ("--env", "=".join(each)))]

    def says(self, *command: str) -> str:
        """Returns what a command of Slurm prints."""
        done = subprocess.run(command, env={**os.environ, **self.cluster}, capture_output=True, text=True, check=True)
        return done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm(folder) as cluster, ssh_hosts(tmp_path_factory.mktemp("login"), ("login",)) as login:
        # Debian's slurm-wlm has them in /usr/bin.
        for program in ("sbatch", "squeue", "scancel", "scontrol"):
            login.pretend("login", program, f'SLURM_CONF={cluster["SLURM_CONF"]} exec /usr/bin/{program} "$@"')
        with PackageServer("127.0.0.1") as packages:
            yield Lab(login=login, cluster=cluster, packages=packages.environment)


def test_a_job_is_preempted_queued_again_stopped_and_resumed(lab: Lab, tiny: Tiny, tmp_path: Path) -> None:
    run, log, user = f"login:{tiny.directory()}", tmp_path / "start.log", lab.laptop(tiny)
    words = [tiny.config.name, "train.steps=100000", "name=tiny", *lab.place("--hosts", "login")]
    shown = user.run(*words, "--dry-run").stdout
    assert "#SBATCH --nodes=2" in shown and "scontrol requeue" in shown
    process = user.start(*words, log=log)
    until(lambda: (tiny.directory() / "metrics.jsonl").exists() and len(tiny.losses()) > 5, "training", process, log)
    second = user.run(*words)
    assert second.returncode == 84 and "attempt 1 is live" in second.stderr, second.stderr

    lab.says("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")
    text = ""

    def is_back() -> bool:
        nonlocal text
        text = log.read_text(errors="replace")
        return len(re.findall(r"job \d+ is RUNNING", text)) > 1 and "resuming" in text

    until(is_back, "running again after preemption", process, log)
    assert re.search(r"job \d+ is PENDING", text), text
    power_off(process)
    last = max(tiny.losses())
    follower = user.start("runs", "logs", run, "--follow", log=log)
    until(lambda: max(tiny.losses()) > last + 5, "going on without the laptop", follower, log)
    power_off(follower)

    stopped = user.run("runs", "stop", run)
    assert not stopped.returncode, stopped.stderr
    last = max(tiny.losses())
    assert (tiny.directory() / "checkpoints" / str(last)).exists()
    assert not lab.says("squeue", "--noheader"), "queued again although the user has stopped it"
    resumed = user.start("runs", "resume", run, log=(again := tmp_path / "resume.log"))
    until(lambda: max(tiny.losses()) > last + 2, "going on after the stop", resumed, again)
    # The laptop asks Slurm every few seconds: on a fast machine the job trains before it says that it runs.
    until(lambda: f"at step {last} of 100000" in again.read_text(errors="replace"), "saying so", resumed, again)
    running = re.compile(r"job (\d+) is RUNNING")
    until(lambda: bool(running.search(again.read_text(errors="replace"))), "saying so", resumed, again)
    lab.says("scancel", running.findall(again.read_text(errors="replace"))[-1])
    assert resumed.wait(600) == 130 and "not started again" in again.read_text(errors="replace")
    assert "step" in user.run("runs", "logs", run, "--lines", "30").stdout
    assert user.run("runs", "logs", run, "--rank", "1").returncode == 0


def test_goes_on_in_what_is_left_of_the_allocation(lab: Lab, tiny: Tiny, tmp_path: Path) -> None:
    run, log, user = tiny.directory(), tmp_path / "start.log", lab.laptop(tiny)  # this machine is the login node
    words = ["mesh.replica=-1", "mesh.fsdp=1", "--elastic", "1..2", "--elastic-wait", "2"]
    process = user.start(tiny.config.name, "train.steps=150", "name=tiny", *words, *lab.place(), log=log)
    until(lambda: (run / "metrics.jsonl").exists() and len(tiny.losses()) > 8, "training", process, log)
    found = subprocess.run(
        ["pgrep", "-f", f"{lab.login.folder}/workdir.*--elastic"], capture_output=True, text=True
    ).stdout
    for task in found.split():
        if b"SLURM_PROCID=1\0" in Path(f"/proc/{task}/environ").read_bytes():
            os.kill(int(task), signal.SIGKILL)
    assert process.wait(600) == 0, log.read_text()
    assert "without 1" in log.read_text() and max(tiny.losses()) == 150
