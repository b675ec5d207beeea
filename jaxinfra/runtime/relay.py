"""Carries the connections to JAX's own service through the port of process 0, where `door` asks for the secret.

The service itself asks nobody, so it listens on the loopback interface of its host alone. And JAX aborts a process
(SIGABRT) whose connection to it breaks, as in a partition or with the death of process 0. Behind a relay it breaks for
no process that lives, and each leaves with the exit code of what `connected_peers` has found out.
"""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from jaxinfra.errors import JaxinfraError
from jaxinfra.runtime.door import RETRY_S, make_patient

RELAY = "relay"
"""The hello of a connection to JAX's service."""
LOOPBACK = "127.0.0.1"
_BLOCK_BYTES = 1 << 18


def relay(dial: Callable[[], socket.socket]) -> int:
    """Returns a port of this machine that leads to JAX's service; each connection to it goes through one of `dial`."""
    listener, kept = socket.create_server((LOOPBACK, 0)), list[socket.socket]()

    def accept() -> None:
        while True:
            near, _ = listener.accept()
            kept.append(near)  # it stays open, whatever becomes of the other side
            threading.Thread(target=connect, args=(near,), name="relay", daemon=True).start()

    def connect(near: socket.socket) -> None:
        try:
            far = dial()
        except JaxinfraError:  # process 0 is gone, as `connected_peers` says
            return
        make_patient(near)
        threading.Thread(target=_copy, args=(far, near), name="relay", daemon=True).start()
        _copy(near, far)
        _shut(far)

    threading.Thread(target=accept, name="relay", daemon=True).start()
    return listener.getsockname()[1]


def pass_on(far: socket.socket, port: int, wait_s: float) -> None:
    """Connects what came through the door with JAX's service, which may start a moment later, until a side closes."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            near = socket.create_connection((LOOPBACK, port))
            break
        except OSError:
            if time.monotonic() > deadline_s:
                return
            time.sleep(RETRY_S)

    def answer() -> None:
        _copy(near, far)
        _shut(far)

    with near:
        make_patient(near)
        threading.Thread(target=answer, name="relay", daemon=True).start()
        _copy(far, near)
        _shut(near)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):  # a side has gone
        while block := source.recv(_BLOCK_BYTES):
            target.sendall(block)


def _shut(channel: socket.socket) -> None:
    with suppress(OSError):  # it is closed already
        channel.shutdown(socket.SHUT_RDWR)
