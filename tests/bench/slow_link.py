"""Two hosts on this machine with a slow link between them: network namespaces, and packets that are passed on late.

Each host is a process that enters a network namespace of its own, makes a TUN device there, and hands it to the process
that has started it. That one (`SlowLink`) reads the packets of one host and writes them to the other after a delay, and
at a limited rate. Nothing must be installed for it, nor cleaned up: a namespace ends with its processes. `tc netem`
does the same, but many kernels lack it.
"""

import fcntl
import heapq
import itertools
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from jaxinfra.errors import ConfigError
from tests.bench.commands import command_error

DEVICE = "slow0"
"""Name of the network device of each host."""
MTU = 8896
"""Most bytes in a packet, as between virtual machines of Google Cloud."""

# From linux/if_tun.h, linux/sockios.h and linux/if.h.
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU, _IFF_UP = 0x8914, 0x8916, 0x891C, 0x8922, 0x1
_IDLE_S = 0.1
_FIX = (
    "run it as root, in a container with --privileged, or after "
    "`sysctl -w user.max_user_namespaces=1000 user.max_net_namespaces=1000`"
)


def address_of(index: int) -> str:
    """Returns the address of a host."""
    return f"10.77.0.{index + 1}"


def bytes_on_link() -> int:
    """Returns the bytes of all packets that this host has sent over the link, as the kernel counts."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == DEVICE:
            return int(counts.split()[8])
    raise ConfigError(f"no device {DEVICE}: not a host of a SlowLink; use `python -m launch bench slices`")


class SlowLink:
    """Two hosts and the link between them, as a context manager.

    Attributes:
        lost_from: the hosts whose packets are lost, at any time.
    """

    def __init__(self, *, delay_s: float, bits_per_s: float):
        """Delay and rate are those of each direction."""
        self._delay_s, self._bits_per_s = delay_s, bits_per_s
        self.lost_from: Collection[int] = ()
        self._devices: list[int] = []
        self._processes: list[subprocess.Popen[str]] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="slow-link", daemon=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        for device in self._devices:
            os.close(device)

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
        """Starts the command of the next host, which does not survive the block.

        Raises ConfigError if this user may not make a network namespace.
        """
        if sys.platform != "linux":
            raise ConfigError(f"a slow link needs network namespaces, which {sys.platform} lacks; use a Linux machine")
        index, (ours, theirs) = len(self._devices), socket.socketpair()
        enter = [sys.executable, "-m", __name__, str(index), str(theirs.fileno()), *command]
        with ours, theirs:
            process = subprocess.Popen(
                enter, env=env, pass_fds=[theirs.fileno()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            theirs.close()
            message, devices, _, _ = socket.recv_fds(ours, 4096, 1)
        if not devices:
            _, stderr = process.communicate()
            raise ConfigError(message.decode()) if message else command_error(enter, stderr)
        self._devices += devices
        self._processes.append(process)
        if len(self._devices) == 2:
            self._thread.start()
        return process

    def _pass_on(self) -> None:
        """The thread that passes packets on."""
        receiver = dict(zip(self._devices, reversed(self._devices), strict=True))
        free_s = dict.fromkeys(self._devices, 0.0)  # when the link has sent all packets that came from a device
        under_way: list[tuple[float, int, int, bytes]] = []  # a heap: time of arrival, number, receiver, packet
        numbers = itertools.count()
        with selectors.DefaultSelector() as selector:
            for device in self._devices:
                selector.register(device, selectors.EVENT_READ)
            while not self._stopped.is_set():
                wait_s = under_way[0][0] - time.monotonic() if under_way else _IDLE_S
                for key, _ in selector.select(min(max(wait_s, 0.0), _IDLE_S)):
                    packet = os.read(key.fd, MTU)
                    if self._devices.index(key.fd) in self.lost_from:
                        continue
                    free_s[key.fd] = max(time.monotonic(), free_s[key.fd]) + 8 * len(packet) / self._bits_per_s
                    arrival_s = free_s[key.fd] + self._delay_s
                    heapq.heappush(under_way, (arrival_s, next(numbers), receiver[key.fd], packet))
                while under_way and under_way[0][0] <= time.monotonic():
                    *_, device, packet = heapq.heappop(under_way)
                    with suppress(OSError):  # the receiver has gone
                        os.write(device, packet)


def main() -> None:
    """Becomes host INDEX, hands its device to socket FD, and becomes the command: INDEX FD COMMAND..."""
    index, descriptor, *command = sys.argv[1:]
    with socket.socket(fileno=int(descriptor)) as parent:
        try:
            device = _enter(int(index))
        except OSError as error:
            what = error.filename or "a network namespace of its own"
            parent.send(f"a slow link needs {what}: {error.strerror}; {_FIX}".encode())
            sys.exit(ConfigError.exit_code)
        socket.send_fds(parent, [b"device"], [device])
    os.execvp(command[0], command)


def _enter(index: int) -> int:
    """Enters new namespaces of network and host name; returns the open TUN device."""
    user = os.geteuid()
    os.unshare(os.CLONE_NEWNET | os.CLONE_NEWUTS | (os.CLONE_NEWUSER if user else 0))
    if user:
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    socket.sethostname(f"slice-{index}")
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, _request(DEVICE, struct.pack("H", _IFF_TUN | _IFF_NO_PI)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for code, argument in (
            (_SIOCSIFADDR, _socket_address(address_of(index))),
            (_SIOCSIFNETMASK, _socket_address("255.255.255.0")),
            (_SIOCSIFMTU, struct.pack("i", MTU)),
            (_SIOCSIFFLAGS, struct.pack("H", _IFF_UP)),
        ):
            fcntl.ioctl(control, code, _request(DEVICE, argument))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _request("lo", struct.pack("H", _IFF_UP)))  # a host reaches itself
    return device


def _request(device: str, argument: bytes) -> bytes:
    """Returns a `struct ifreq`."""
    return struct.pack("16s24s", device.encode(), argument)


def _socket_address(address: str) -> bytes:
    """Returns a `struct sockaddr_in`."""
    return struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address))


if __name__ == "__main__":
    main()
