"""A server that speaks as much of the Hugging Face Hub's protocol as reading a model takes, and plain HTTP."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import override

REPOSITORY = "lab/story"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves the files of one folder, at `http://127.0.0.1:PORT`.

    Attributes:
        url: its address.
        read_bytes: number of bytes of files that were answered.
        errors: the statuses that the next requests get in place of an answer.
        missing: the status of a file that is not there; S3 has 403 for who may not list a bucket.
        moved_to: the server that all requests are redirected to, if there is one.
        authorizations: the Authorization header of each request, or None.
        endless: how requests whose path ends with a name are answered without an end, by name: "silent" sends nothing,
            "trickle" a byte now and then, "flood" as many as are taken.
        bytes_per_s: how fast it sends; None is as fast as it can.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.read_bytes, self.missing = folder, 0, 404
        self.errors: Iterator[int | None] = iter(())
        self.moved_to: str | None = None
        self.authorizations: list[str | None] = []
        self.endless: dict[str, str] = {}
        self.bytes_per_s: int | None = None
        self._is_over = Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        thread = Thread(target=self._server.serve_forever)
        thread.start()
        try:
            yield self
        finally:
            self._is_over.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            @override
            def log_message(self, format: str, *args: object) -> None:
                pass

            @override
            def handle(self) -> None:
                with suppress(ConnectionError):  # the client has gone
                    super().handle()

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if self._goes_elsewhere():
                    return
                names = re.findall(r"paths=([^&]*)", body) or json.loads(body)["paths"]
                self._json([hub.entry(name) for name in names if (hub.folder / name).is_file()])

            def _goes_elsewhere(self) -> bool:
                hub.authorizations.append(self.headers.get("Authorization"))
                if hub.moved_to is not None:
                    self._send(307, b"", {"Location": f"{hub.moved_to}{self.path}"})
                return hub.moved_to is not None

            def _go_on_for_ever(self, how: str) -> None:
                self.close_connection = True
                if how != "silent":
                    self.send_response(206 if "Range" in self.headers else 200)
                    self.end_headers()
                piece, pause_s = {"silent": (b"", 0.05), "trickle": (b" ", 0.05), "flood": (b" " * 65536, 0)}[how]
                with suppress(ConnectionError):
                    while not hub._is_over.wait(pause_s):
                        self.wfile.write(piece)

            def _answer(self) -> None:
                path = self.path.partition("?")[0]
                if self._goes_elsewhere():
                    return
                endless = next((how for name, how in hub.endless.items() if path.endswith(name)), None)
                if endless is not None and self.command == "GET":
                    self._go_on_for_ever(endless)
                elif status := next(hub.errors, None):
                    self._send(status, b"no")
                elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
                    self._json([hub.entry(each.name) for each in sorted(hub.folder.iterdir())])
                elif path.startswith(f"/api/models/{REPOSITORY}"):
                    self._json({"id": REPOSITORY, "sha": COMMIT, "private": False, "siblings": [], "tags": []})
                else:
                    name = path.rpartition("/")[2]
                    found = path.startswith((f"/{REPOSITORY}/resolve/", "/plain/")) and (hub.folder / name).is_file()
                    self._file(hub.folder / name) if found else self._send(hub.missing, b"Entry not found")

            def _json(self, content: object) -> None:
                self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

            def _file(self, path: Path) -> None:
                content, headers = path.read_bytes(), {"ETag": '"1"', "Accept-Ranges": "bytes", "X-Repo-Commit": COMMIT}
                if self.command == "HEAD":
                    self._send(200, content, headers)
                elif match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                    first, last = map(int, match.groups())
                    headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                    hub.read_bytes += len(content[first : last + 1])
                    self._send(206, content[first : last + 1], headers)
                else:
                    hub.read_bytes += len(content)
                    self._send(200, content, headers)

            def _send(self, code: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    size = len(content) if hub.bytes_per_s is None else hub.bytes_per_s // 20
                    for start in range(0, len(content), size or 1):
                        hub._is_over.wait(0 if hub.bytes_per_s is None else 0.05)
                        self.wfile.write(content[start : start + size])

        return Handler

    def entry(self, name: str) -> dict[str, object]:
        """How the Hub lists a file."""
        return {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0" * 40}
