"""Machines of a cloud in miniature: a Debian of its own, a network, sshd, and the metadata server of Compute Engine.

Each is a set of Linux namespaces. All end with the process that has booted them, however that ends.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from tests.cloud import guest_agent, leftovers
from tests.cloud.forwarder import Forwarder
from tests.cloud.leftovers import PREFIX, ip
from tests.cloud.metadata import ADDRESS, Metadata, token_of
from tests.cloud.root import debian_root, locked

PROJECT = "tests-project"
PROJECT_NUMBER = "123456789012"
SERVICE_ACCOUNT = f"{PROJECT_NUMBER}-compute@developer.gserviceaccount.com"

_FIRMWARE = {"product_name": "Google Compute Engine", "sys_vendor": "Google", "bios_vendor": "Google"}
_BOOT_S = 60.0  # the longest that a boot takes
_SUBNETS = range(70, 250)  # of 10.N.0.0/24


class Host:
    """A machine, see `machines.Machine`; its namespaces are those of the process `pid`."""

    def __init__(self, name: str, address: str, metadata: Metadata, folder: Path, link: str) -> None:
        self.name, self.address, self.metadata, self.link = name, address, metadata, link
        self.log = folder / f"{name}.log"
        self.pid = 0  # of its first process, once it is up
        self._folder = folder
        self._root: int | None = None  # a descriptor of its `/`
        self._process: subprocess.Popen[str] | None = None
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()

    @property
    def is_running(self) -> bool:
        """Whether it has power."""
        return self._process is not None and self._process.poll() is None

    def set(self, key: str, value: str) -> None:
        """See `Machine.set`."""
        self.metadata.set(f"instance/{key}", value)
        if key == "attributes/ssh-keys":
            with self._inside() as root:
                if root is not None:
                    guest_agent.set_users(root, guest_agent.keys_by_user(value))

    def set_keys(self, text: str) -> None:
        """Says who may log in, with which keys: lines as `user:ssh-ed25519 AAAA... comment`."""
        self.set("attributes/ssh-keys", text)

    def preempt(self, after_s: float = 30.0) -> None:
        """See `Machine.preempt`."""
        self.set("preempted", "TRUE")
        if after_s <= 0:
            return self.power_off()
        self._timer = threading.Timer(after_s, self.power_off)
        self._timer.daemon = True
        self._timer.start()

    def delete(self) -> None:
        """See `Machine.delete`."""
        if self._timer is not None:
            self._timer.cancel()
        self.power_off()

    def set_names(self, text: str) -> None:
        """Writes `/etc/hosts`; does nothing before it is up, and when it has ended."""
        with self._inside() as root:
            if root is not None:
                (root / "etc/hosts").write_text(text)

    def run(self, *command: str) -> str:
        """Runs a command as root, without ssh, and returns what it prints."""
        inside = ["nsenter", f"--target={self.pid}", "--all", *command]
        return subprocess.run(inside, check=True, stdout=subprocess.PIPE, text=True).stdout

    def power_on(self, lower: Path, network: "Hosts") -> None:
        """Starts it, and returns when sshd answers."""
        scratch = self._folder / self.name
        scratch.mkdir(exist_ok=True)
        owner = os.pidfd_open(os.getpid())
        spec = {"name": self.name, "lower": str(lower), "scratch": str(scratch), "shared": str(network.shared)}
        spec |= {"owner": owner, "firmware": _FIRMWARE}
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("init.py"))]
        try:
            with self.log.open("w") as log:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, pass_fds=[owner],
                    text=True, start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(owner)
        self._start(spec)
        leftovers.record(self._folder / f"{self.name}.pid", self.pid)
        ip(f"link add {self.link} type veth peer name eth0 netns {self.pid}",
           f"link set {self.link} master {network.bridge} up")  # fmt: skip
        ip("link set lo up", f"address add {ADDRESS}/32 dev lo", f"address add {self.address}/24 dev eth0",
           "link set eth0 up", namespace=self.pid)  # fmt: skip
        self.metadata.serve(_listener(self.pid, (ADDRESS, 80)))
        self.set_keys(self.metadata.get("instance/attributes/ssh-keys") or "")
        self._wait_for_sshd()

    def power_off(self) -> None:
        """Ends all its processes, and with them its network and what it has stored."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            if self._root is not None:
                os.close(self._root)
                self._root = None
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.pid or process.pid, signal.SIGKILL)
            process.wait()  # for the first process, which ends after all others
            assert process.stdout is not None
            process.stdout.close()
            self.metadata.close()
            leftovers.delete_link(self.link)
            (self._folder / f"{self.name}.pid").unlink(missing_ok=True)
            (self._folder / self.name).rmdir()

    @contextlib.contextmanager
    def _inside(self) -> Iterator[Path | None]:
        """Gives its `/` as seen from outside, None if it is not up, and holds off its end meanwhile.

        It goes by a descriptor: `/proc/PID/root` is that of this machine until the host has its own, and again when
        another process has the number.
        """
        with self._lock:
            yield None if self._root is None else Path(f"/proc/self/fd/{self._root}")

    def _start(self, spec: Mapping[str, object]) -> None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        with self._process.stdin as told:  # rather than an argument, which a host's `ps` would show
            told.write(json.dumps(spec))
        said = dict[str, str]()
        while not {"pid", "ready"} <= said.keys():
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"{self.name}: the host does not boot:\n{self.log.read_text()[-2000:]}")
            key, _, value = line.strip().partition(" ")
            said[key] = value
        self.pid = int(said["pid"])
        with self._lock:
            self._root = os.open(f"/proc/{self.pid}/root", os.O_PATH | os.O_DIRECTORY)

    def _wait_for_sshd(self) -> None:
        deadline = time.monotonic() + _BOOT_S
        while True:
            try:
                with socket.create_connection((self.address, 22), timeout=5) as connection:
                    if connection.recv(4) == b"SSH-":
                        return
                problem = "sshd hangs up"
            except OSError as error:
                problem = str(error)
            if not self.is_running or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: sshd does not answer: {problem}:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.02)


class Hosts:
    """A network of machines, see `machines.Machines`.

    `gateway` is the address at which they reach the tests, `shared` what all have as `/shared`, as an NFS disk.
    """

    def __init__(self) -> None:
        self.gateway = self.bridge = ""
        self._folder: Path | None = None
        self.shared = self._lower = Path()
        self._lock = threading.Lock()
        self._hosts: dict[str, Host] = {}
        self._count = 0
        self._forwarders: dict[int, Forwarder] = {}

    def __enter__(self) -> Self:
        self._lower = debian_root()
        with locked(leftovers.LOCK):
            self._folder = leftovers.new_folder()
            self.shared = self._folder / "shared"
            self.shared.mkdir()
            self.shared.chmod(0o777)
            self.bridge = f"{PREFIX}{self._folder.name}b"
            self.gateway = f"10.{_free_subnet()}.0.1"
            ip(f"link add {self.bridge} type bridge", f"address add {self.gateway}/24 dev {self.bridge}",
               f"link set {self.bridge} up")  # fmt: skip
        return self

    def __exit__(self, *error: object) -> None:
        assert self._folder is not None
        try:
            for each in (*self._forwarders.values(), *self._hosts.values()):
                each.close() if isinstance(each, Forwarder) else each.delete()
        finally:
            with locked(leftovers.LOCK):
                leftovers.remove(self._folder)

    def boot(self, name: str, *, attributes: Mapping[str, str], zone: str, preemptible: bool = False) -> Host:
        """See `Machines.boot`."""
        assert self._folder is not None, "the hosts are not entered"
        with self._lock:
            if name in self._hosts and self._hosts[name].is_running:
                raise ValueError(f"{name}: a machine of this name runs")
            number, self._count = self._count, self._count + 1
            address = f"{self.gateway.rpartition('.')[0]}.{number % 250 + 2}"
            values = values_of(name, address, attributes, zone, number, preemptible=preemptible)
            host = Host(name, address, Metadata(values), self._folder, f"{PREFIX}{self._folder.name}h{number}")
            self._hosts[name] = host
        try:
            host.power_on(self._lower, self)
        except BaseException:
            host.delete()
            raise
        self._tell_names(zone)
        return host

    def forward(self, port: int) -> int:
        """Returns the port of `gateway` at which hosts reach this port of 127.0.0.1."""
        with self._lock:
            if port not in self._forwarders:
                self._forwarders[port] = Forwarder(self.gateway, port)
            return self._forwarders[port].port

    def _tell_names(self, zone: str) -> None:
        """Has each host know the names of all, as the cloud's DNS does."""
        with self._lock:
            running = [host for host in self._hosts.values() if host.is_running and host.pid]
            lines = ["127.0.0.1 localhost", f"{ADDRESS} metadata.google.internal metadata"]
            lines += [f"{host.address} {_full_name(host.name, zone)} {host.name}" for host in running]
            for host in running:
                host.set_names("\n".join([*lines, ""]))


def values_of(
    name: str, address: str, attributes: Mapping[str, str], zone: str, number: int, *, preemptible: bool
) -> dict[str, str]:
    """Returns what the metadata server says."""
    account = {
        "aliases": "default\n",
        "email": SERVICE_ACCOUNT,
        "scopes": "https://www.googleapis.com/auth/cloud-platform\n",
        "token": json.dumps({"access_token": token_of(name), "expires_in": 3599, "token_type": "Bearer"}),
    }
    return {
        "project/project-id": PROJECT,
        "project/numeric-project-id": PROJECT_NUMBER,
        "instance/id": str(10**18 + number),
        "instance/name": name,
        "instance/hostname": _full_name(name, zone),
        "instance/zone": f"projects/{PROJECT_NUMBER}/zones/{zone}",
        "instance/machine-type": f"projects/{PROJECT_NUMBER}/machineTypes/n2-standard-2",
        "instance/network-interfaces/0/ip": address,
        "instance/preempted": "FALSE",
        "instance/maintenance-event": "NONE",
        "instance/scheduling/preemptible": str(preemptible).upper(),
        "instance/scheduling/on-host-maintenance": "TERMINATE",
        **{f"instance/attributes/{key}": value for key, value in attributes.items()},
        **{
            f"instance/service-accounts/{alias}/{key}": value
            for alias in ("default", SERVICE_ACCOUNT)
            for key, value in account.items()
        },
    }


def _full_name(name: str, zone: str) -> str:
    return f"{name}.{zone}.c.{PROJECT}.internal"


def _free_subnet() -> int:
    done = subprocess.run(["ip", "-j", "address", "show"], check=True, capture_output=True, text=True)
    taken = {info["local"] for link in json.loads(done.stdout) for info in link.get("addr_info", ())}
    return next(each for each in _SUBNETS if not any(address.startswith(f"10.{each}.") for address in taken))


def _listener(pid: int, address: tuple[str, int]) -> socket.socket:
    """Returns a socket that listens in the network of another process; a thread goes there, and does not return."""
    found: list[socket.socket | OSError] = []

    def listen() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                os.setns(namespace.fileno(), os.CLONE_NEWNET)
            found.append(socket.create_server(address, backlog=100))
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    if isinstance(found[0], OSError):
        raise found[0]
    return found[0]
