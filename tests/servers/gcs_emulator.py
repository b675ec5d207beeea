"""Google Cloud Storage as far as TensorStore and gcsfs use its JSON API, in memory.

Writes on a condition are refused when it does not hold. Who comes without a token is let in, as to a public
bucket; a wrong token is refused. https://cloud.google.com/storage/docs/json_api/v1
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.faulty_proxy import LocalServer, QuietHandler

TOKEN = "a-token-that-is-never-shown"
_OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)")
_OBJECTS = re.compile(r"(?:/upload)?/storage/v1/b/([^/]+)/o")
_BUCKET = re.compile(r"/storage/v1/b/([^/]+)")


@dataclass
class Objects:
    """What is stored: tests may look and damage.

    Attributes:
        buckets: of each bucket, of each object its generation and content.
        altered: what is stored in place of the content of an upload; None stores nothing, and the answer says it did.
        is_stale: whether listings leave out the newest object.
    """

    buckets: dict[str, dict[str, tuple[int, bytes]]]
    altered: Callable[[str, bytes], bytes | None] = lambda name, content: content
    is_stale: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    generations: Iterator[int] = field(default_factory=lambda: itertools.count(1))


class _Refused(Exception):
    def __init__(self, status: int, reason: str):
        self.status = status
        self.reason = reason


class _Handler(QuietHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the end of an answer waits 40 ms for the client to confirm its beginning
    wbufsize = -1

    @property
    def _objects(self) -> Objects:
        assert isinstance(self.server, _Server)
        return self.server.objects

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers: dict[str, str] = {}
        try:
            if (given := self.headers.get("Authorization", f"Bearer {TOKEN}")) != f"Bearer {TOKEN}":
                raise _Refused(401, f"Invalid Credentials: {given}")
            with self._objects.lock:
                status, answer, headers = self._answer(url.path, body)
        except _Refused as refusal:
            status = refusal.status
            answer = json.dumps({"error": {"code": status, "message": refusal.reason}}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_DELETE = _serve

    def _answer(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        if match := _OBJECT.fullmatch(path):
            bucket, name = self._bucket(match[1]), unquote(match[2])
            if name not in bucket:
                raise _Refused(404, f"No such object: {match[1]}/{name}")
            self._check_conditions(bucket[name][0])
            if self.command == "DELETE":
                del bucket[name]
                return 204, b"", {}
            if self.query.get("alt") != "media":
                return self._json(self._describe(match[1], name))
            return self._content(*bucket[name])
        if match := _OBJECTS.fullmatch(path):
            bucket = self._bucket(match[1])
            if self.command == "GET":
                return self._json(self._list(match[1]))
            if self.query.get("uploadType") != "media":
                raise _Refused(400, f"uploadType={self.query.get('uploadType')} is not served")
            name = self.query["name"]
            self._check_conditions(bucket[name][0] if name in bucket else 0)
            if (stored := self._objects.altered(name, body)) is None:
                return self._json({"kind": "storage#object", "bucket": match[1], "name": name, "generation": "1"})
            bucket[name] = next(self._objects.generations), stored
            return self._json(self._describe(match[1], name))
        if match := _BUCKET.fullmatch(path):
            self._bucket(match[1])
            return self._json({"kind": "storage#bucket", "name": match[1]})
        raise _Refused(400, f"unknown: {self.command} {path}")

    def _bucket(self, name: str) -> dict[str, tuple[int, bytes]]:
        if name not in self._objects.buckets:
            raise _Refused(404, "The specified bucket does not exist.")
        return self._objects.buckets[name]

    def _check_conditions(self, generation: int) -> None:
        if int(self.query.get("ifGenerationMatch", generation)) != generation:
            raise _Refused(412, "conditionNotMet")
        if int(self.query.get("ifGenerationNotMatch", -1)) == generation:
            raise _Refused(304, "not modified")

    def _content(self, generation: int, content: bytes) -> tuple[int, bytes, dict[str, str]]:
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, content, headers
        total = len(content)
        start = int(asked[1]) if asked[1] else max(0, total - int(asked[2]))
        end = min(total, int(asked[2]) + 1) if asked[1] and asked[2] else total
        if start >= total:
            raise _Refused(416, "The requested range cannot be satisfied.")
        return 206, content[start:end], headers | {"Content-Range": f"bytes {start}-{end - 1}/{total}"}

    def _list(self, bucket: str) -> dict[str, Any]:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        items: list[str] = []
        prefixes: set[str] = set()
        stored = self._objects.buckets[bucket]
        newest = max(stored, key=lambda name: stored[name][0], default=None) if self._objects.is_stale else None
        for name in sorted(stored.keys() - {newest}):
            below = "endOffset" in self.query and name >= self.query["endOffset"]
            if not name.startswith(prefix) or name < self.query.get("startOffset", "") or below:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(name)
        return {"items": [self._describe(bucket, name) for name in items], "prefixes": sorted(prefixes)}

    def _describe(self, bucket: str, name: str) -> dict[str, Any]:
        generation, content = self._objects.buckets[bucket][name]
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "generation": str(generation),
            "size": str(len(content)),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _json(self, answer: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json; charset=UTF-8"}


class _Server(LocalServer):
    def __init__(self, objects: Objects):
        super().__init__(_Handler)
        self.objects = objects


@contextmanager
def emulated(bucket: str) -> Iterator[tuple[int, Objects]]:
    """A server inside the block: its port, and what it stores."""
    objects = Objects({bucket: {}})
    with _Server(objects) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port, objects
        finally:
            server.shutdown()
            thread.join()
