"""Runs on hosts by ssh: real sshd on loopback, real uv, and the launching machine that goes away."""

import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cloud.laptop import Laptop, power_off, until
from tests.cloud.packages import PackageServer
from tests.launchers.ssh_hosts import SshHosts, ssh_hosts
from tests.tiny_run import Tiny

pytestmark = pytest.mark.slow(20)
SECRET = "a-secret-that-lies-nowhere"


@dataclass(frozen=True, kw_only=True)
class Lab:
    """Two hosts, and what they install from."""

    hosts: SshHosts
    packages: Mapping[str, str]

    def laptop(self, name: str, tiny: Tiny) -> Laptop:
        """Returns a machine of a user, whose checkout has the tiny run."""
        environment = {"JAXINFRA_SSH": self.hosts.ssh, "A_TOKEN": SECRET, **self.packages}
        return Laptop(self.hosts.folder / f"{tiny.config.parent.name}-{name}", environment, project=tiny.config.parent)

    def place(self, *hosts: str) -> list[str]:
        """Returns the options of a start on hosts."""
        words = ["--place", "ssh", "--hosts", ",".join(hosts), "--devices", "cpu:1", "--secret", "A_TOKEN"]
        environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "UV_LINK_MODE": "symlink", **self.packages}
        environment |= {"UV_CACHE_DIR": f"{self.hosts.folder}/uv", "PYTHONPYCACHEPREFIX": f"{self.hosts.folder}/pyc"}
        return [*words, *(word for each in environment.items() for word in ("--env", "=".join(each)))]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with ssh_hosts(tmp_path_factory.mktemp("ssh"), ("a", "b")) as hosts, PackageServer("127.0.0.1") as packages:
        yield Lab(hosts=hosts, packages=packages.environment)


@pytest.fixture
def user(lab: Lab, tiny: Tiny) -> Laptop:
    """The machine of a user, whose checkout has one commit."""
    laptop = lab.laptop("laptop", tiny)
    (laptop.project / ".gitignore").write_text("runs\n*.log\n")
    laptop.commit()
    return laptop


def test_goes_on_without_the_launching_machine(lab: Lab, tiny: Tiny, user: Laptop, tmp_path: Path) -> None:
    run, log = f"a:{tiny.directory()}", tmp_path / "start.log"
    (tmp_path / "note.txt").write_text("not committed")
    words = [tiny.config.name, "train.steps=400", "name=tiny", *lab.place("a", "b")]
    process = user.start(*words, log=log)
    until(lambda: (tiny.directory() / "metrics.jsonl").exists() and len(tiny.losses()) > 5, "training", process, log)
    assert "note.txt" in log.read_text() and "attempt 1 runs on 2 hosts: a, b" in log.read_text()
    again = user.run(*words)
    assert again.returncode == 84 and "attempt 1 is live on a, b" in again.stderr, again.stderr
    second = user.run(tiny.config.name, "name=second", *lab.place("a"))
    assert second.returncode == 84 and f"host a: trains {run}" in second.stderr, second.stderr
    power_off(process)

    before = max(tiny.losses())
    followed = tmp_path / "follow.log"
    other = lab.laptop("other", tiny)
    process = other.start("runs", "logs", run, "--follow", "--lines", "0", log=followed)
    until(lambda: max(tiny.losses()) > before + 5, "going on", process, followed)
    power_off(process)
    held = [path for path in lab.hosts.folder.rglob("*") if path.is_file() and b"lies-nowhere" in path.read_bytes()]
    assert not held, "the secret lies on a disk"

    stopped = other.run("runs", "stop", run)
    assert not stopped.returncode, stopped.stderr
    last = max(tiny.losses())
    assert 5 < last < 400 and (tiny.directory() / "checkpoints" / str(last)).exists()
    for name in lab.hosts.names:
        processes = subprocess.run(["pgrep", "-f", f"{lab.hosts.home(name)}/"], capture_output=True, text=True).stdout
        assert not processes, f"left on {name}: {processes}"

    resumed = other.run("runs", "resume", run)  # names a secret that this machine has, too
    assert not resumed.returncode, resumed.stderr
    assert "attempt 2 runs on 2 hosts" in resumed.stderr and max(tiny.losses()) == 400
    assert f"at step {last} of 400" in resumed.stdout, resumed.stdout
    assert "is done" in other.run("runs", "resume", run).stderr


def test_hosts_are_checked_before_anything_starts(lab: Lab, tiny: Tiny, user: Laptop) -> None:
    def refused(*hosts: str, code: int = 81) -> str:
        ended = user.run(tiny.config.name, *lab.place(*hosts))
        assert ended.returncode == code and not tiny.directory().exists(), ended.stderr
        assert ended.stderr.count("error: ") == 1, ended.stderr
        return ended.stderr.partition("error: ")[2]

    assert "nowhere.invalid: ssh cannot reach it" in refused("a", "nowhere.invalid", code=76)
    assert "--hosts: a stands there twice" in refused("a", "a")
    lab.hosts.pretend("b", "uname", 'case $1 in -m) echo riscv64 ;; *) exec /bin/uname "$@" ;; esac')
    assert f"host b: architecture riscv64, a has {platform.machine()}" in refused("a", "b")
    lab.hosts.pretend("b", "uname", 'exec /bin/uname "$@"')
    lab.hosts.pretend("b", "nvidia-smi", 'echo "NVIDIA H100 80GB HBM3, 580.65"')
    assert "host b: GPUs and driver NVIDIA H100 80GB HBM3, 580.65, a has none" in refused("a", "b")
    (lab.hosts.home("b") / "bin" / "nvidia-smi").unlink()
    lab.hosts.pretend("b", "df", 'echo; echo "tmpfs 1000000 900000 100000 90% /"')
    workdir = ("--workdir", str(lab.hosts.folder / "elsewhere"))
    ended = user.run(tiny.config.name, *lab.place("b"), *workdir)
    assert ended.returncode == 81 and "host b: 0.1 GiB free, 6 are needed" in ended.stderr, ended.stderr
    (lab.hosts.home("b") / "bin" / "df").unlink()
