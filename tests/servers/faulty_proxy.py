"""Stands in front of an HTTP server and passes every request on unchanged, except when a fault is due."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, override


class QuietHandler(BaseHTTPRequestHandler):
    """Answers at once to who waits before it sends, and says nothing on the terminal."""

    @override
    def handle_expect_100(self) -> bool:
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass


class LocalServer(ThreadingHTTPServer):
    """Takes a free port of the loopback interface."""

    request_queue_size = 128  # more would have to try again after a second

    def __init__(self, handler: type[BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", 0), handler)


_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


class Faults:
    """What goes wrong, and how much came: tests set the attributes at any time.

    Attributes:
        unavailable: share of requests that are answered with 503.
        reset: share of connections that are reset, half of them in the middle of the answer.
        delay_s: every answer comes so much later.
        down: every connection is reset.
        after: called with the method and path of each request that was answered, before the answer goes out.
        requests: that came.
        fired: that went wrong.
        read_bytes: of the answers to GET, by path without the query.
        gets: requests that read an object or a part of it, by path without the query.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Nothing goes wrong any more; counts start anew."""
        with self._lock:
            self._rng = random.Random(0)
            self.unavailable = self.reset = self.delay_s = 0.0
            self.down = False
            self.after: Callable[[str], None] = lambda path: None
            self.requests = self.fired = 0
            self.gets, self.read_bytes = Counter[str](), Counter[str]()

    def down_for(self, seconds: float) -> None:
        """Is down from now on for so long."""
        self.down = True
        threading.Timer(seconds, lambda: setattr(self, "down", False)).start()

    def count(self, path: str, answer: bytes) -> None:
        """Counts what was read."""
        with self._lock:
            self.gets[path.partition("?")[0]] += 1
            self.read_bytes[path.partition("?")[0]] += len(answer)

    def draw(self) -> Literal["unavailable", "reset", "torn", None]:
        """What happens to the next request."""
        with self._lock:
            self.requests += 1
            fate = self._rng.random()
            kind = None
            if self.down:
                kind = "reset"
            elif fate < self.unavailable:
                kind = "unavailable"
            elif fate < self.unavailable + self.reset:
                kind = "torn" if self._rng.random() < 0.5 else "reset"
            self.fired += kind is not None
            return kind


class _Handler(QuietHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the end of an answer waits 40 ms for the client to confirm its beginning
    wbufsize = -1

    @property
    def _proxy(self) -> "_Proxy":
        assert isinstance(self.server, _Proxy)
        return self.server

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self._proxy.faults.draw()
        time.sleep(self._proxy.faults.delay_s)
        if fault == "reset":
            self._reset()
        elif fault == "unavailable":
            self._answer(503, [("Content-Type", "text/plain")], b"slow down")
        else:
            self._answer(*self._ask(body), torn=fault == "torn")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self._proxy.upstream_port, timeout=60)
        try:
            # The host stays the one that the client signed.
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP:
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            content = answer.read()
            if self.command == "GET":
                self._proxy.faults.count(self.path, content)
            self._proxy.faults.after(f"{self.command} {self.path}")
            return answer.status, answer.getheaders(), content
        finally:
            upstream.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, torn: bool = False) -> None:
        self.send_response_only(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if torn else body)
        if torn:
            self._reset()

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


class _Proxy(LocalServer):
    def __init__(self, upstream_port: int, faults: Faults):
        super().__init__(_Handler)
        self.upstream_port = upstream_port
        self.faults = faults

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that was reset is none to report."""


@contextmanager
def faulty(upstream_port: int) -> Iterator[tuple[int, Faults]]:
    """A proxy inside the block: its port, and what goes wrong in it."""
    faults = Faults()
    with _Proxy(upstream_port, faults) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield proxy.server_port, faults
        finally:
            proxy.shutdown()
            thread.join()
