"""A Google Cloud of one project on this machine: its APIs over HTTP, with the machines that they make.

    with Cloud(PaperMachines()) as cloud:
        cloud.stockout("us-east5-b")
        ...  # with JAXINFRA_GOOGLE_ENDPOINT=cloud.endpoint
        assert cloud.remaining() == []

A request without a token may do all that `deny` does not take. A host sends the token of its metadata server, and has
the rights of its service account, which a test gives in `rights`.
"""

import fnmatch
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from tests.cloud import answers
from tests.cloud.answers import Asked, Json, Refused
from tests.cloud.catalog import ZONES
from tests.cloud.compute_api import ComputeApi
from tests.cloud.machines import Machine, Machines
from tests.cloud.tpu_api import TpuApi

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform", "https://www.googleapis.com/auth/compute")


class Cloud:
    """The cloud, and the switches by which a test makes its days bad."""

    def __init__(
        self,
        machines: Machines,
        *,
        project: str = "test-project",
        delay_s: float = 0.0,
        external: Callable[[str], str] = lambda address: address,
    ) -> None:
        self.machines, self.project, self.external = machines, project, external
        self.delay_s = delay_s  # that a state lasts; 0 ends each when it was read once
        self.log: list[tuple[str, str, Any]] = []  # method, path with its query, body
        self.quota: dict[str, int] = {}  # chips of a kind, such as v6e, that the project may have in a zone
        self.rights: dict[str, set[str]] = {}  # permissions by email of a service account; "*" and "tpu.*" are patterns
        self.reservations: set[str] = set()
        self.service_account = "123456-compute@developer.gserviceaccount.com"  # the default one of the project
        self._denied: set[str] = set()
        self._stockouts: dict[str, float] = {}
        self._tokens: dict[str, tuple[str, Sequence[str]]] = {}
        self._later: list[Callable[[], None]] = []
        self.lock = threading.RLock()
        self.tpu, self.compute = TpuApi(self), ComputeApi(self)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def stockout(self, zone: str, times: float = 1) -> None:
        """Has no capacity in a zone for so many tries; a tier of guaranteed capacity is no exception."""
        with self.lock:
            self._stockouts[zone] = times

    def deny(self, permission: str) -> None:
        """Takes a permission, such as compute.instanceGroupManagers.create, from everybody."""
        self._denied.add(permission)

    def allow(self, permission: str) -> None:
        """Gives back what `deny` took."""
        self._denied.discard(permission)

    def preempt(self, name: str, after_s: float = 30.0) -> None:
        """Takes back Spot capacity: a queued resource or node, or an instance or group with all its instances.

        Their hosts get the notice now, and lose power after this time.
        """
        with self.lock:
            if not (self.tpu.preempt(name, after_s) or self.compute.preempt(name, after_s)):
                raise ValueError(f"{name}: expected a queued resource, node, group or instance that runs")

    def maintenance(self, name: str, start: datetime) -> None:
        """Plans the maintenance of a queued resource, node, group or instance; its hosts and the API tell of it."""
        with self.lock:
            if not (self.tpu.maintenance(name, start) or self.compute.maintenance(name, start)):
                raise ValueError(f"{name}: expected a queued resource, node, group or instance that runs")

    def remaining(self) -> list[str]:
        """Returns what exists and is not being deleted, such as "node us-east5-b/a READY"."""
        with self.lock:
            return sorted([*self.tpu.remaining(), *self.compute.remaining()])

    def golden(self, replace: Mapping[str, str] | None = None) -> str:
        """Returns all requests for a golden file, without times, keys and generated names."""
        with self.lock:
            return answers.golden(self.log, {self.endpoint: "ENDPOINT"} | dict(replace or {}))

    def hosts(self) -> list[Machine]:
        """Returns the machines that run."""
        with self.lock:
            return [machine for machine in [*self.tpu.machines(), *self.compute.machines()] if machine.is_running]

    # What the APIs ask of it

    def is_out_of_stock(self, zone: str) -> bool:
        """Whether a try to get capacity fails; counts the try."""
        left = self._stockouts.get(zone, 0)
        self._stockouts[zone] = max(left - 1, 0)
        return left > 0

    def require(self, asked: Asked, permission: str, name: str) -> None:
        """Refuses a request whose sender lacks a permission."""
        if permission in self._denied:
            raise answers.denied(permission, name)
        if asked.caller is None:
            return
        email, scopes = asked.caller
        if not set(scopes) & set(_SCOPES if permission.startswith("compute.") else _SCOPES[:1]):
            raise Refused(403, "PERMISSION_DENIED", "Request had insufficient authentication scopes.")
        if not any(fnmatch.fnmatchcase(permission, right) for right in self.rights.get(email, ())):
            raise answers.denied(permission, name)

    def check_project(self, project: str) -> None:
        """Refuses another project than the one that exists."""
        if project != self.project:
            raise Refused(403, "PERMISSION_DENIED", f"Permission denied on resource project {project}.")

    def known_zone(self, zone: str) -> bool:
        """Whether a zone exists."""
        return zone in ZONES

    def give_token(self, machine: Machine, email: str, scopes: Sequence[str]) -> None:
        """Lets a machine act as a service account."""
        token = f"ya29.machine-{len(self._tokens) + 1}"
        self._tokens[token] = (email, tuple(scopes))
        answer = {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}
        machine.set("service-accounts/default/token", json.dumps(answer))
        machine.set("service-accounts/default/email", email)
        machine.set("service-accounts/default/scopes", "\n".join(scopes))

    def later(self, act: Callable[[], None]) -> None:
        """Acts when the answer is sent: the request may come from the machine that it deletes."""
        self._later.append(act)

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Json]:
        """Returns the status and the JSON of an answer; the lock is held."""
        parts = urlsplit(path)
        asked = Asked(method=method, path=parts.path, query=dict(parse_qsl(parts.query)), body=body, caller=None)
        api = self.compute if parts.path.startswith("/compute/v1/") else self.tpu
        try:
            if token is not None:
                if token not in self._tokens:
                    raise Refused(401, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
                asked.caller = self._tokens[token]
            return 200, api.answer(asked)
        except Refused as refused:
            return refused.http, refused.compute() if api is self.compute else refused.tpu()
        finally:
            self.log.append((method, path, _body(body) if asked.parsed is None else asked.parsed))

    def finish(self) -> None:
        """Does what was put off until the answer was sent; the lock is held."""
        while self._later:
            self._later.pop(0)()


def _body(body: bytes) -> Any:
    """Returns the body of a request that no API has understood."""
    try:
        return json.loads(body) if body else None
    except ValueError:
        return body.decode(errors="replace")


def _handler(cloud: Cloud) -> type[BaseHTTPRequestHandler]:
    """Returns a handler of requests to this cloud."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one packet: of two, the second waits 40 ms for the client

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
            with cloud.lock:
                status, answer = cloud.answer(self.command, self.path, body, token if scheme == "Bearer" else None)
                try:
                    self._send(status, json.dumps(answer).encode())
                finally:
                    cloud.finish()

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _do

        def _send(self, status: int, text: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json; charset=UTF-8")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            self.wfile.flush()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    return Handler
