"""The metadata server of a host, as Compute Engine has one at http://169.254.169.254 in each virtual machine.

See https://docs.cloud.google.com/compute/docs/metadata/querying-metadata .
"""

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import parse_qs, urlsplit

type Tree = dict[str, Tree | str]

ADDRESS = "169.254.169.254"

_FLAVOR = ("Metadata-Flavor", "Google")
_ROOT = "/computeMetadata/v1"
_SECRET = "token"  # which no recursive answer has
_NO_MAINTENANCE = {"error": "no notifications have been received yet, try again later"}
_WAIT_S = 3600.0  # for a change, unless the request says otherwise


def token_of(name: str) -> str:
    """Returns the access token that the metadata server of this machine hands out, for an API to tell who asks."""
    return f"token-of-{name}"


class Metadata:
    """Values by their paths under `computeMetadata/v1/`, and servers that answer with them."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)
        self._changed = threading.Condition()
        self._server: ThreadingHTTPServer | None = None

    def get(self, path: str) -> str | None:
        """Returns a value, None if there is none."""
        return self._values.get(path)

    def set(self, path: str, value: str) -> None:
        """Sets a value, and answers those who wait for a change."""
        with self._changed:
            self._values[path] = value
            self._changed.notify_all()

    def serve(self, listener: socket.socket) -> None:
        """Answers in threads at a socket that listens, which it closes at `close`."""
        server = _Server((ADDRESS, 80), _Handler, bind_and_activate=False)
        server.socket.close()
        server.socket, server.metadata = listener, self
        self._server = server
        threading.Thread(target=server.serve_forever, args=(0.05,), name="metadata", daemon=True).start()

    def close(self) -> None:
        """Ends the server."""
        with self._changed:
            server, self._server = self._server, None
            self._changed.notify_all()
        if server is not None:
            server.shutdown()
            server.server_close()

    def at(self, path: str) -> Tree | str | None:
        """Returns what is at a path: a directory, a value, or None."""
        found: Tree | str | None = self._tree()
        for part in filter(None, path.split("/")):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def wait(self, path: str, etag: str | None, timeout_s: float) -> Tree | str | None:
        """Waits until what is at the path is no longer what it was, or what has this tag."""
        before = etag if etag is not None else tag(self.at(path))
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while tag(self.at(path)) == before and self._server is not None:
                if not self._changed.wait(deadline - time.monotonic()):
                    break
        return self.at(path)

    def _tree(self) -> Tree:
        tree: Tree = {}
        for path, value in sorted(dict(self._values).items()):
            *folders, name = path.split("/")
            folder = tree
            for each in folders:
                folder = cast(Tree, folder.setdefault(each, {}))
            # What is planned is a directory, which the tests set as a whole.
            folder[name] = json.loads(value) if name == "upcoming-maintenance" else value
        return tree


def tag(found: Tree | str | None) -> str:
    """Returns the ETag of an answer."""
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    metadata: Metadata


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Metadata Server for VM", ""
    timeout = 60

    def do_GET(self) -> None:
        metadata = cast(_Server, self.server).metadata
        url = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = url.path.removeprefix(_ROOT)
        if url.path == "/":  # as libraries ask to learn whether this is Compute Engine
            return self._answer("computeMetadata/\n")
        if self.headers.get(_FLAVOR[0]) != _FLAVOR[1] or "X-Forwarded-For" in self.headers:
            return self._answer(f"expected the header {': '.join(_FLAVOR)}\n", HTTPStatus.FORBIDDEN)
        if not f"{url.path}/".startswith(f"{_ROOT}/"):
            return self._answer("not found\n", HTTPStatus.NOT_FOUND)
        found = metadata.at(path)
        if query.get("wait_for_change", "").lower() == "true":
            found = metadata.wait(path, query.get("last_etag"), float(query.get("timeout_sec", _WAIT_S)))
        recursive = query.get("recursive", "false").lower() in ("true", "")
        if found is None and path.strip("/") == "instance/upcoming-maintenance":
            return self._answer(json.dumps(_NO_MAINTENANCE), HTTPStatus.SERVICE_UNAVAILABLE, "application/json")
        if found is None:
            return self._answer("not found\n", HTTPStatus.NOT_FOUND)
        kind = query.get("alt") or ("json" if recursive or path.endswith(f"/{_SECRET}") else "text")
        name = path.rstrip("/").rpartition("/")[2]
        if isinstance(found, str):
            text = json.dumps(_json_value(name, found)) if kind == "json" and name != _SECRET else found
            return self._answer(text, kind=f"application/{kind}", etag=tag(found))
        if not recursive and kind != "json" and not path.endswith("/"):
            return self._redirect(f"{url.path}/")
        if kind == "json":
            text = json.dumps(_json_value(name, found))
        elif recursive:
            text = "".join(f"{path} {value}\n" for path, value in _flat(found))
        else:
            text = "".join(f"{name}/\n" if isinstance(each, dict) else f"{name}\n" for name, each in found.items())
        return self._answer(text, kind=f"application/{kind}", etag=tag(found))

    def _redirect(self, path: str) -> None:
        self.send_response(HTTPStatus.MOVED_PERMANENTLY)
        self.send_header("Location", f"http://{self.headers.get('Host', ADDRESS)}{path}")
        self.send_header(*_FLAVOR)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(
        self, text: str, status: HTTPStatus = HTTPStatus.OK, kind: str = "application/text", etag: str = ""
    ) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header(*_FLAVOR)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def _as_json(tree: Tree) -> dict[str, object]:
    """Returns it with the keys and types that JSON has, without secrets; the keys of users stay as they are."""
    return {
        key if "@" in key else re.sub(r"-([a-z])", lambda match: match[1].upper(), key): _json_value(key, value)
        for key, value in tree.items()
        if key != _SECRET
    }


def _json_value(key: str, value: Tree | str) -> object:
    if isinstance(value, str):
        if key in ("aliases", "scopes"):
            return value.split()
        return int(value) if key in ("id", "numeric-project-id") else value
    if key in ("attributes", "upcoming-maintenance"):
        return value
    return list(_as_json(value).values()) if "0" in value else _as_json(value)  # by their numbers


def _flat(tree: Tree, prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        if key != _SECRET:
            pairs += [(prefix + key, value)] if isinstance(value, str) else _flat(value, f"{prefix}{key}/")
    return pairs
