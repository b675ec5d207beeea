"""Passes connections on to servers that listen on loopback only, for hosts that cannot reach it."""

import contextlib
import socket
import threading

_CHUNK = 1 << 18


class Forwarder:
    """Listens at an address, and connects whoever comes to a port of 127.0.0.1; threads end with the process."""

    def __init__(self, address: str, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((address, 0), backlog=100)
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="forwarder", daemon=True).start()

    @property
    def port(self) -> int:
        """The port at the address."""
        return self._listener.getsockname()[1]

    def close(self) -> None:
        """Ends it, with all connections."""
        for each in (self._listener, *self._connections.copy()):
            _shut(each, socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # nobody listens: the client's connection ends, too
                return
            with server:
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections |= {client, server}
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()
                self._connections -= {client, server}


def _pump(source: socket.socket, target: socket.socket) -> None:
    """Passes on what comes, then its end, in one direction."""
    buffer = bytearray(_CHUNK)
    try:
        while size := source.recv_into(buffer):
            target.sendall(memoryview(buffer)[:size])
    except OSError:  # one end was reset: so is the other
        _shut(source, socket.SHUT_RDWR)
        _shut(target, socket.SHUT_RDWR)
        return
    _shut(target, socket.SHUT_WR)


def _shut(connection: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # not connected any more
        connection.shutdown(how)
