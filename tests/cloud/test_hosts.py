"""Whether the hosts of tests are what tests take them for, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import uv

from tests.cloud import leftovers
from tests.cloud.hosts import Host, Hosts
from tests.cloud.machines import Machine, Machines
from tests.cloud.packages import PackageServer

pytestmark = pytest.mark.slow(3)

ZONE = "us-east5-a"


class Key:
    """A user's key, and ssh with it."""

    def __init__(self, folder: Path) -> None:
        self._file, known = folder / "id", folder / "known_hosts"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self._file], check=True)
        self.public = self._file.with_suffix(".pub").read_text().strip()
        self.options = ["-F", "none", "-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=accept-new"]
        self.options += ["-o", "BatchMode=yes", "-i", str(self._file)]

    def ssh(self, host: Host, command: str, user: str = "ada") -> str:
        """What the command prints; refused or failed, CalledProcessError."""
        full = ["ssh", *self.options, f"{user}@{host.address}", command]
        return subprocess.run(full, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Key:
    return Key(tmp_path_factory.mktemp("key"))


@pytest.fixture
def boot(hosts: Hosts, key: Key) -> Iterator[Callable[[str], Host]]:
    booted: list[Host] = []

    def boot(name: str) -> Host:
        host = hosts.boot(name, attributes={"ssh-keys": f"ada:{key.public}", "run": "/runs/7"}, zone=ZONE)
        booted.append(host)
        return host

    yield boot
    for host in booted:
        host.delete()


def test_hosts_are_machines(hosts: Hosts, boot: Callable[[str], Host]) -> None:
    machines: Machines = hosts
    machine: Machine = boot("w-0")
    assert machines is hosts and machine.is_running


def test_hosts_that_boot_at_once_leave_this_machine_alone(boot: Callable[[str], Host], key: Key) -> None:
    """Nothing is written to the `/` of this machine, also before hosts have their own."""
    files = [Path("/etc", name) for name in ("hosts", "passwd", "group", "shadow", "resolv.conf")]
    before = [(file.stat().st_mtime_ns, file.read_bytes()) for file in files]
    with ThreadPoolExecutor() as pool:
        hosts = [*pool.map(boot, ("w-0", "w-1", "w-2"))]
    assert [key.ssh(hosts[0], f"getent hosts {host.name}").split()[0] for host in hosts] == [
        host.address for host in hosts
    ]
    assert [(file.stat().st_mtime_ns, file.read_bytes()) for file in files] == before


def test_hosts_are_separate_and_reach_each_other(boot: Callable[[str], Host], key: Key) -> None:
    first, second = boot("w-0"), boot("w-1")
    assert key.ssh(first, "id -un; hostname; pwd").split() == ["ada", "w-0", "/home/ada"]
    key.ssh(first, "echo here > /tmp/mine")
    assert key.ssh(second, "ls /tmp") == ""
    assert key.ssh(second, "ps -e -o comm=").split().count("sshd") == 1
    assert "python" not in key.ssh(second, "ls /usr/bin")
    assert key.ssh(second, "getent hosts w-0").split()[0] == first.address
    assert key.ssh(second, "timeout 5 head -c 4 < /dev/tcp/w-0/22") == "SSH-"
    assert key.ssh(second, "cat /sys/class/dmi/id/product_name") == "Google Compute Engine\n"
    assert key.ssh(second, "cat /sys/devices/system/cpu/online").strip()


def test_metadata_answers_in_the_host_alone(boot: Callable[[str], Host], key: Key) -> None:
    first, second = boot("w-0"), boot("w-1")
    assert _metadata(key, first, "instance/name").endswith("\r\n\r\nw-0")
    assert _metadata(key, second, "instance/name").endswith("\r\n\r\nw-1")
    first.set("attributes/run", "/runs/8")
    assert _metadata(key, first, "instance/attributes/run").endswith("/runs/8")
    assert _metadata(key, second, "instance/attributes/run").endswith("/runs/7")


def test_users_follow_the_metadata(boot: Callable[[str], Host], key: Key) -> None:
    host = boot("w-0")
    host.set_keys(f"ada:{key.public}\nbob:{key.public}")
    assert key.ssh(host, "id -un; touch ~/mine", user="bob") == "bob\n"
    assert key.ssh(host, "id -un") == "ada\n"
    host.set("attributes/ssh-keys", f"bob:{key.public}")
    assert key.ssh(host, "ls ~", user="bob") == "mine\n"
    with pytest.raises(subprocess.CalledProcessError, match="255"):
        key.ssh(host, "true")


def test_hosts_reach_servers_of_loopback(hosts: Hosts, boot: Callable[[str], Host], key: Key) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(1 << 20))

        def log_message(self, format: str, *args: object) -> None:
            pass

    host = boot("w-0")
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        try:
            port = hosts.forward(server.server_port)
            request = rf"exec 3<>/dev/tcp/{hosts.gateway}/{port}; printf 'GET / HTTP/1.0\r\n\r\n' >&3; cat <&3 | wc -c"
            assert int(key.ssh(host, request)) > 1 << 20
        finally:
            server.shutdown()
    with pytest.raises(subprocess.CalledProcessError) as refused:
        key.ssh(host, "< /dev/tcp/192.0.2.99/80")
    assert "Network is unreachable" in refused.value.stderr


def test_uv_installs_python_and_packages(hosts: Hosts, boot: Callable[[str], Host], key: Key) -> None:
    host = boot("w-0")
    with PackageServer(hosts.gateway) as server:
        subprocess.run(["scp", "-q", *key.options, uv.find_uv_bin(), f"ada@{host.address}:uv"], check=True)
        variables = " ".join(f"{name}={value}" for name, value in server.environment.items())
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        key.ssh(host, f"{variables} ./uv venv --quiet --managed-python --python {version} venv")
        key.ssh(host, f"{variables} ./uv pip install --quiet --python venv jax numpy")
        modules = "bz2, ctypes, curses, decimal, hashlib, lzma, readline, sqlite3, ssl, uuid, zlib"
        key.ssh(host, f"venv/bin/python -c 'import {modules}'")
        assert key.ssh(host, "venv/bin/python -c 'import jax; print(jax.devices())'") == "[CpuDevice(id=0)]\n"
        with pytest.raises(subprocess.CalledProcessError) as refused:
            key.ssh(host, f"{variables} ./uv pip install --python venv no-such-package")
        assert "no-such-package was not found" in refused.value.stderr
    assert "/simple/jaxlib/" in server.log


@pytest.mark.parametrize("end", ["preempt", "delete"])
def test_an_end_leaves_nothing(boot: Callable[[str], Host], key: Key, end: str) -> None:
    host = boot("w-0")
    key.ssh(host, "nohup sleep 1000 > /dev/null 2>&1 & exit 0")
    spaces = _namespaces(host.pid)
    assert len(_processes_in(spaces)) >= 3
    if end == "preempt":
        host.preempt(after_s=0.5)
        assert _metadata(key, host, "instance/preempted").endswith("TRUE")
        assert host.is_running
        deadline = time.monotonic() + 10
        while host.is_running and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        host.delete()
    assert not host.is_running
    host.delete()  # waits for the end of a power-off in another thread, and may come twice
    assert not _processes_in(spaces)
    assert host.link not in leftovers.links()
    assert str(leftovers.STATE) not in Path("/proc/self/mountinfo").read_text()
    again = boot("w-0")
    assert "run" not in key.ssh(again, "ls ~")


def test_hosts_end_with_their_process_and_the_next_one_sweeps(tmp_path: Path) -> None:
    code = (
        "import sys, time; from tests.cloud.hosts import Hosts\n"
        "with Hosts() as hosts:\n"
        f"    host = hosts.boot('w-0', attributes={{}}, zone='{ZONE}')\n"
        "    print(host.pid, hosts.bridge, host.link, flush=True); time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid, bridge, link = process.stdout.readline().split()
    spaces = _namespaces(int(pid))
    assert {bridge, link} <= set(leftovers.links())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while _processes_in(spaces) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _processes_in(spaces)
    assert bridge in leftovers.links()
    with Hosts():
        assert not {bridge, link} & set(leftovers.links())
        assert not (leftovers.STATE / bridge.removeprefix(leftovers.PREFIX).removesuffix("b")).exists()


def _metadata(key: Key, host: Host, path: str) -> str:
    """What the metadata server says, asked without more than bash."""
    request = rf"GET /computeMetadata/v1/{path} HTTP/1.0\r\nMetadata-Flavor: Google\r\n\r\n"
    command = f"exec 3<>/dev/tcp/metadata.google.internal/80; printf '{request}' >&3; cat <&3"
    full = ["ssh", *key.options, f"ada@{host.address}", command]
    return subprocess.run(full, check=True, capture_output=True).stdout.decode()


def _namespaces(pid: int) -> set[str]:
    """Those of a process that are not ours."""
    own = {os.readlink(path) for path in Path("/proc/self/ns").iterdir()}
    return {os.readlink(path) for path in Path(f"/proc/{pid}/ns").iterdir()} - own


def _processes_in(namespaces: set[str]) -> set[int]:
    found: set[int] = set()
    for folder in Path("/proc").glob("[0-9]*/ns"):
        try:
            inside = {os.readlink(path) for path in folder.iterdir()}
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended, or is the machine's own
            continue
        if inside & namespaces:
            found.add(int(folder.parent.name))
    return found
