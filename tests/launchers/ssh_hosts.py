"""Hosts on this machine: a real sshd for each, on loopback, with a home of its own and the user's own name."""

import getpass
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.servers.guard import free_ports, guarded

_SSHD = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
MaxStartups 100
ForceCommand exec env HOME={home} PATH={home}/bin:$PATH sh -c "$SSH_ORIGINAL_COMMAND"
"""
_CLIENT = """\
Host *
  User {user}
  HostName 127.0.0.1
  IdentityFile {folder}/key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
"""


@dataclass(frozen=True, kw_only=True)
class SshHosts:
    """The hosts, and how ssh reaches them."""

    folder: Path
    names: Sequence[str]

    @property
    def ssh(self) -> str:
        """The value of JAXINFRA_SSH."""
        return f"ssh -F {self.folder}/config"

    def home(self, name: str) -> Path:
        """Returns the home of the user on a host."""
        return self.folder / name

    def pretend(self, name: str, program: str, script: str) -> None:
        """Replaces a program of a host."""
        path = self.home(name) / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)


@contextmanager
def ssh_hosts(folder: Path, names: Sequence[str]) -> Iterator[SshHosts]:
    """Starts sshd for each host; fails with its log if it does not start."""
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/bin:/usr/local/sbin")
    assert sshd is not None, "no sshd: install openssh-server"
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # of its privilege separation; made at boot, and not in containers
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    config = [f"Host {name}\n  Port {port}\n" for name, port in ports.items()]
    (folder / "config").write_text("".join(config) + _CLIENT.format(user=getpass.getuser(), folder=folder))
    hosts = SshHosts(folder=folder, names=names)
    with guards(folder, sshd, ports, hosts):
        yield hosts


@contextmanager
def guards(folder: Path, sshd: str, ports: dict[str, int], hosts: SshHosts) -> Iterator[None]:
    """Runs the servers while the block runs, and waits until they answer."""
    if not ports:
        yield
        return
    (name, port), *others = ports.items()
    hosts.home(name).mkdir()
    (folder / f"{name}.sshd").write_text(_SSHD.format(port=port, folder=folder, home=hosts.home(name)))
    log = folder / f"{name}.log"
    with guarded([sshd, "-D", "-e", "-f", str(folder / f"{name}.sshd")], log):
        deadline_s = time.monotonic() + 60
        while subprocess.run([*hosts.ssh.split(), name, "true"], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        with guards(folder, sshd, dict(others), hosts):
            yield
