"""What hosts install without the internet: a Python by uv, and the packages of the environment of these tests."""

import hashlib
import json
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self, cast
from urllib.parse import quote, unquote, urlsplit

from tests.cloud.python_build import python_archive
from tests.cloud.wheels import installed, normalized, wheel, wheel_name

_BUILDS = "https://github.com/astral-sh/python-build-standalone/releases/download"
_RELEASE = "20250101"


class PackageServer:
    """Serves at an address; `environment` has what tells uv of it."""

    def __init__(self, address: str) -> None:
        self.log: list[str] = []
        """The paths that were asked for."""
        self._server = _Server((address, 0), _Handler)
        self._server.log = self.log

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="packages", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """Where it is."""
        address, port = self._server.server_address[:2]
        return f"http://{address!s}:{port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """The variables by which uv takes Python and packages from here, and from nowhere else."""
        return {
            "UV_DEFAULT_INDEX": f"{self.url}/simple/",
            "UV_PYTHON_INSTALL_MIRROR": f"{self.url}/python",
            "UV_PYTHON_DOWNLOADS_JSON_URL": f"{self.url}/python/downloads.json",
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # of connections; each uv opens many, and Linux waits seconds with one that is not taken
    log: list[str]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        cast(_Server, self.server).log.append(path)
        kind, _, name = path.strip("/").partition("/")
        answer = _ANSWERS.get(kind, lambda name: None)(name)
        if answer is None:
            return self.send_error(HTTPStatus.NOT_FOUND)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Length", str(answer.stat().st_size if isinstance(answer, Path) else len(answer)))
        self.send_header("Content-Type", "text/html" if kind == "simple" else "application/octet-stream")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if isinstance(answer, bytes):
            self.wfile.write(answer)
            return None
        with answer.open("rb") as file:
            self.connection.sendfile(file)
        return None

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: `PackageServer.log` has it."""


def _index(name: str) -> bytes | None:
    distribution = installed().get(normalized(name))
    if distribution is None:
        return None
    file = wheel_name(distribution)
    return f'<a href="/wheels/{quote(file)}" data-core-metadata="true">{file}</a>\n'.encode()


def _wheel(name: str) -> Path | bytes | None:
    file = name.removesuffix(".metadata")
    distribution = installed().get(normalized(file.partition("-")[0]))
    if distribution is None or wheel_name(distribution) != file:
        return None
    return wheel(distribution) if file == name else (distribution.read_text("METADATA") or "").encode()


def _python(name: str) -> Path | bytes | None:
    if name == "downloads.json":
        return _downloads()
    return python_archive() if name == f"{_RELEASE}/{_archive_name()}" else None


def _archive_name() -> str:
    return f"cpython-{platform.python_version()}+{_RELEASE}-{platform.machine()}-unknown-linux-gnu-install_only.tar.gz"


@cache
def _downloads() -> bytes:
    """Returns the list of Pythons to download, as uv has its own."""
    version, machine = sys.version_info, platform.machine()
    with python_archive().open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = {
        "name": "cpython",
        "arch": {"family": machine, "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": version.major,
        "minor": version.minor,
        "patch": version.micro,
        "prerelease": "",
        "url": f"{_BUILDS}/{_RELEASE}/{quote(_archive_name())}",
        "sha256": digest,
        "variant": None,
        "build": _RELEASE,
    }
    return json.dumps({f"cpython-{platform.python_version()}-linux-{machine}-gnu": entry}).encode()


_ANSWERS: Mapping[str, Callable[[str], Path | bytes | None]] = {"simple": _index, "wheels": _wheel, "python": _python}
