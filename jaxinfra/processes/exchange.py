"""Sends bytes from process to process, over connections of their own: the hub of process 0 passes on small values only.

Whoever connects must know a secret (`door`), which the hub has passed on.
"""

import itertools
import json
import socket
import time
from collections.abc import Buffer, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import override

from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.cpu_collectives import reachable_address
from jaxinfra.processes.door import Json, OtherSecretError, ProtocolError, answer, knock, new_secret, send_line
from jaxinfra.processes.peer_connection import listen
from jaxinfra.storage.closing import ClosedOnExit

_SILENCE_S = 60.0  # without a byte; one that is lost is noticed by the hub long before
_MAX_LINE_BYTES = 2**24

type Parcel = tuple[Json, Buffer]
"""A label, which tells the receiver what the content is, and the content."""


class Exchange(ClosedOnExit):
    """The connections of a process to others; all processes create it, and call `swap` equally often."""

    def __init__(self, peers: ConnectedPeers) -> None:
        host = reachable_address(peers.gather(peers.addresses), peers.index)
        self._index = peers.index
        self._listener = listen(f"[{host}]:0" if ":" in host else f"{host}:0")
        self._listener.settimeout(_SILENCE_S)
        self._addresses = [(host, port) for host, port in peers.gather((host, self._listener.getsockname()[1]))]
        self._secret = peers.broadcast(new_secret())
        self._numbers = itertools.count(1)

    def swap(
        self, outgoing: Mapping[int, Iterable[Parcel]], sources: Collection[int]
    ) -> Iterator[tuple[Json, bytearray]]:
        """Sends to other processes, and yields what `sources` send to this one; raises OSError if one does not.

        All of it must be taken: a sender waits for that.
        """
        number = next(self._numbers)
        with ThreadPoolExecutor(max(1, len(outgoing)), "exchange") as pool:
            sends = [pool.submit(self._send, target, number, parcels) for target, parcels in outgoing.items()]
            yield from self._receive(number, sources)
            for send in sends:
                send.result()

    @override
    def close(self) -> None:
        self._listener.close()

    def _send(self, target: int, number: int, parcels: Iterable[Parcel]) -> None:
        with self._connect(target, number) as channel:
            channel.settimeout(_SILENCE_S)
            for label, content in parcels:
                view = memoryview(content)
                send_line(channel, [label, view.nbytes])
                channel.sendall(view)
            send_line(channel, None)

    def _connect(self, target: int, number: int) -> socket.socket:
        deadline_s = time.monotonic() + _SILENCE_S
        while True:
            channel = socket.create_connection(self._addresses[target], _SILENCE_S)
            try:
                knock(channel, self._secret, [number, self._index], _SILENCE_S)  # the other one may be busy
            except OSError as error:  # again if this process was too slow for the other one
                channel.close()
                if isinstance(error, ProtocolError | OtherSecretError) or time.monotonic() > deadline_s:
                    raise
            else:
                return channel

    def _receive(self, number: int, sources: Collection[int]) -> Iterator[tuple[Json, bytearray]]:
        hellos = [[number, source] for source in sources]
        while hellos:
            channel, _ = self._listener.accept()
            with channel, channel.makefile("rb") as stream:
                try:
                    hello = answer(channel, self._secret)
                except OSError:  # a stranger
                    continue
                if hello not in hellos:  # of an exchange that was given up
                    continue
                hellos.remove(hello)
                channel.settimeout(_SILENCE_S)
                while (header := _parse(stream.readline(_MAX_LINE_BYTES))) is not None:
                    label, num_bytes = header
                    content = bytearray(num_bytes)
                    if stream.readinto(content) < num_bytes:
                        raise ConnectionResetError("the other process has closed the connection")
                    yield label, content


def _parse(line: bytes) -> Json:
    if not line.endswith(b"\n"):
        raise ConnectionResetError("the other process has closed the connection")
    return json.loads(line)
