"""The API of a cluster: discovery, who may do what, and the verbs on objects, over HTTP."""

import fnmatch
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.cluster.objects import disrupt
from tests.cluster.schemas import KINDS, Json, Kind, Refused, check, decode, not_found

if TYPE_CHECKING:
    from tests.cluster.server import Cluster

_BUILT_IN = ("", "batch", "scheduling.k8s.io")
OPERATORS = ("jobset.x-k8s.io", "trainer.kubeflow.org", "kueue.x-k8s.io")
_PRESERVED = (
    "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them "
    "or set propagationPolicy=Orphan to suppress this warning"
)


class _Answer(NamedTuple):
    """Answers a request with JSON, text, or parts of a stream."""

    code: int
    body: Json | str | Iterator[str]
    warnings: Sequence[str] = ()


class Requests:
    """Answers the requests to a cluster."""

    def __init__(self, cluster: "Cluster") -> None:
        self._cluster = cluster

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        """Returns the answer to a request; the lock is held."""
        parts = urlsplit(path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        try:
            parsed: Any = json.loads(body) if body else {}
            self._cluster.requests.append((method, path, deepcopy(parsed)))
            if self._cluster.broken is not None:  # rather than have clients wait for what will not come
                raise Refused(
                    500, "InternalError", f"the controllers of this cluster of tests ended: {self._cluster.broken!r}"
                )
            if headers.get("Authorization") != f"Bearer {self._cluster.token}":
                raise Refused(401, "Unauthorized", "Unauthorized")
            words = [unquote(word) for word in parts.path.strip("/").split("/")]
            return self._discover(words) or self._review(words, parsed) or self._serve(
                method, words, query, parsed, headers.get("Content-Type") or ""
            )  # fmt: skip
        except json.JSONDecodeError as error:
            return _Answer(400, Refused(400, "BadRequest", f"error decoding request: {error}").status)
        except Refused as refused:
            return _Answer(refused.code, refused.status)

    def _discover(self, words: Sequence[str]) -> _Answer | None:
        """Returns which APIs there are."""
        if words == ["version"]:
            return _Answer(200, {"major": "1", "minor": "34", "gitVersion": "v1.34.1", "platform": "linux/amd64"})
        if words == ["api"]:
            return _Answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        known = [kind for kind in KINDS if kind.group in (*_BUILT_IN, *self._cluster.installed)]
        versions = {name: sorted({k.version for k in known if k.group == name}) for name in {k.group for k in known}}
        groups = [
            {"name": name, "versions": [{"groupVersion": f"{name}/{each}", "version": each} for each in of],
             "preferredVersion": {"groupVersion": f"{name}/{of[-1]}", "version": of[-1]}}
            for name, of in versions.items() if name
        ]  # fmt: skip
        if words == ["apis"]:
            return _Answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        if words[:1] == ["apis"] and len(words) == 2 and words[1] in versions:
            group = next(each for each in groups if each["name"] == words[1])
            return _Answer(200, {"kind": "APIGroup", "apiVersion": "v1", **group})
        if words == ["api", "v1"] or (words[0] == "apis" and len(words) == 3):
            verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
            found = [kind for kind in known if kind.api_version == "/".join(words[1:])]
            resources = [
                {"name": kind.plural, "singularName": kind.kind.lower(), "namespaced": kind.namespaced,
                 "kind": kind.kind, "verbs": verbs} for kind in found
            ]  # fmt: skip
            if found:
                return _Answer(200, {"kind": "APIResourceList", "groupVersion": "/".join(words[1:]),
                                     "apiVersion": "v1", "resources": resources})  # fmt: skip
        return None

    def _review(self, words: Sequence[str], body: Json) -> _Answer | None:
        """Says whether the user may do something, before they do it."""
        if words != ["apis", "authorization.k8s.io", "v1", "selfsubjectaccessreviews"]:
            return None
        asked = body["spec"]["resourceAttributes"]
        sub, group = asked.get("subresource"), asked.get("group")
        what = asked["resource"] + (f".{group}" if group else "") + (f"/{sub}" if sub else "")
        return _Answer(201, body | {"status": {"allowed": self._may(asked["verb"], what)}})

    def _may(self, verb: str, what: str) -> bool:
        return not any(fnmatch.fnmatchcase(f"{verb} {what}", pattern) for pattern in self._cluster.denied)

    def _serve(self, method: str, words: Sequence[str], query: Mapping[str, str], body: Json, of: str) -> _Answer:
        start, version = (2, "v1") if words[0] == "api" else (3, "/".join(words[1:3]))
        rest, namespace = [*words[start:]], None
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = next((k for k in KINDS if k.api_version == version and [k.plural] == rest[:1]), None)
        if kind is None or kind.group not in (*_BUILT_IN, *self._cluster.installed) or len(rest) > 3:
            return _Answer(404, "404 page not found\n")
        name, sub = [*rest[1:], "", ""][:2]
        verb = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch",
                "DELETE": "delete" if name else "deletecollection"}[method]  # fmt: skip
        verb = "watch" if verb == "list" and query.get("watch") in ("true", "True", "1") else verb
        self._require(verb, kind, namespace, name, sub)
        if method == "POST" and not sub:
            if (
                namespace is not None
                and body.setdefault("metadata", {}).setdefault("namespace", namespace) != namespace
            ):
                raise Refused(400, "BadRequest", "the namespace of the provided object does not match the namespace "
                              "sent on the request")  # fmt: skip
            warnings = self._cluster.create(kind, body, validation=query.get("fieldValidation") or "Warn",
                                   dry_run=query.get("dryRun") == "All")  # fmt: skip
            return _Answer(201, deepcopy(body), warnings)
        if verb == "watch":
            return _Answer(200, self._watch(kind, namespace, query))
        if not name:
            found = [each for each in self._cluster.find(kind.plural, namespace) if _matches(each, query)]
            for each in found if method == "DELETE" else ():
                self._cluster.delete(each)
            items = [deepcopy(each) | {"apiVersion": kind.api_version} for each in found]
            meta = {"resourceVersion": str(len(self._cluster.events) + 999)}
            return _Answer(200, {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": meta,
                                 "items": items})  # fmt: skip
        found = self._cluster.objects.get((kind.plural, namespace or "", name))
        if found is None:
            raise not_found(kind, name)
        if sub == "log":
            return _Answer(200, self._cluster.kubelet.log(found, query))
        if sub == "eviction" and method == "POST":
            disrupt(found, "EvictionByEvictionAPI", "Eviction API: evicting")
            self._cluster.delete(found, grace_s=(body.get("deleteOptions") or {}).get("gracePeriodSeconds"))
            done = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}
            return _Answer(201, done)
        if sub not in ("", "status"):
            return _Answer(404, "404 page not found\n")
        if method == "DELETE":
            return self._delete(kind, found, query, body)
        if method != "GET":
            self._update(kind, found, body, query, of if method == "PATCH" else "")
        return _Answer(200, deepcopy(found) | {"apiVersion": kind.api_version})

    def _require(self, verb: str, kind: Kind, namespace: str | None, name: str, sub: str) -> None:
        if not self._may(verb, kind.resource + (f"/{sub}" if sub else "")):
            where = f'in the namespace "{namespace}"' if namespace else "at the cluster scope"
            why = f'User "{self._cluster.user}" cannot {verb} resource "{kind.plural}{sub and "/" + sub}" in API group '
            why += f'"{kind.group}" {where}'
            raise Refused(403, "Forbidden", f"{kind.resource}{name and f' "{name}"'} is forbidden: {why}",
                          {"name": name, "group": kind.group, "kind": kind.plural})  # fmt: skip

    def _delete(self, kind: Kind, found: Json, query: Mapping[str, str], body: Json) -> _Answer:
        options = {**query, **body}
        policy = options.get("propagationPolicy")
        grace_s = options.get("gracePeriodSeconds")
        orphans = kind.kind == "Job" and policy is None
        self._cluster.delete(
            found, policy or ("Orphan" if orphans else "Background"), None if grace_s is None else int(grace_s)
        )
        warnings = [_PRESERVED] if orphans else []
        if any(each is found for each in self._cluster.objects.values()):  # finalizers or a process hold it
            return _Answer(200, deepcopy(found), warnings)
        details = {"name": found["metadata"]["name"], "group": kind.group, "kind": kind.plural}
        done = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return _Answer(200, done, warnings)

    def _update(self, kind: Kind, found: Json, body: Any, query: Mapping[str, str], patch: str) -> None:
        accepted = ["application/merge-patch+json"]
        accepted += [] if kind.group in OPERATORS else ["application/strategic-merge-patch+json"]  # as a plain one
        if patch and patch not in accepted:
            why = "the body of the request was in an unknown format - accepted media types include: "
            raise Refused(415, "UnsupportedMediaType", why + ", ".join(accepted))
        new = _merged(found, body) if patch else body
        old = found["metadata"]
        if new["metadata"].get("resourceVersion", old["resourceVersion"]) != old["resourceVersion"]:
            raise Refused(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind.resource} "{old["name"]}": the '
                "object has been modified; please apply your changes to the latest version and try again",
            )
        new = new | {"status": found.get("status", {})} if "status" in found else new
        new["metadata"] |= {key: old[key] for key in ("uid", "creationTimestamp", "name", "generation")}
        decode(kind, new, query.get("fieldValidation") or "Warn")
        check(kind, new, found)
        new["metadata"]["generation"] += new.get("spec") != found.get("spec")
        found.clear()
        found.update(new)
        self._cluster.publish()

    def _watch(self, kind: Kind, namespace: str | None, query: Mapping[str, str]) -> Iterator[str]:
        """Yields what changes, as a line of JSON each."""
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        with self._cluster.lock:
            since, at = query.get("resourceVersion") or "0", len(self._cluster.events)
            present = (
                [("ADDED", deepcopy(each)) for each in self._cluster.find(kind.plural, namespace)]
                if since == "0"
                else []
            )
            at = (
                at
                if since == "0"
                else next((n for n, event in enumerate(self._cluster.events) if event[0] > int(since)), at)
            )
        while True:
            for event, body in present:
                if namespace in (None, body["metadata"].get("namespace")) and _matches(body, query):
                    yield json.dumps({"type": event, "object": body | {"apiVersion": kind.api_version}}) + "\n"
            with self._cluster.lock:
                while at == len(self._cluster.events) and not self._cluster.ended and time.monotonic() < deadline:
                    self._cluster.changed.wait(min(1.0, max(deadline - time.monotonic(), 0.0)))
                if at == len(self._cluster.events):
                    return
                present = [
                    (event, body) for _, event, plural, body in self._cluster.events[at:] if plural == kind.plural
                ]
                at = len(self._cluster.events)


def _merged(old: Json, patch: Json) -> Json:
    """Returns the JSON merge patch of an object (RFC 7386)."""
    new = {key: deepcopy(value) for key, value in old.items() if patch.get(key, value) is not None}
    for key, value in patch.items():
        if isinstance(value, dict):
            new[key] = _merged(new[key] if isinstance(new.get(key), dict) else {}, value)
        elif value is not None:
            new[key] = value
    return new


def _matches(body: Json, query: Mapping[str, str]) -> bool:
    """Whether an object is one that the selectors of a request mean."""
    labels = body["metadata"].get("labels", {})
    for term in re.split(r",(?![^(]*\))", query.get("labelSelector") or ""):
        if found := re.fullmatch(r"\s*([^\s!=]+)\s+(in|notin)\s+\(([^)]*)\)\s*", term):
            if (labels.get(found[1]) in re.split(r"\s*,\s*", found[3])) != (found[2] == "in"):
                return False
        elif found := re.fullmatch(r"\s*([^\s!=]+)\s*(==?|!=)\s*(\S*)\s*", term):
            if (labels.get(found[1]) == found[3]) == (found[2] == "!="):
                return False
        elif term.strip() and (term.strip().lstrip("!") in labels) == term.strip().startswith("!"):
            return False
    for term in filter(None, (query.get("fieldSelector") or "").split(",")):
        path, operator, wanted = re.split(r"(!=|==?)", term, maxsplit=1)
        value: Any = body
        for word in path.split("."):
            value = value.get(word, "") if isinstance(value, dict) else ""
        if (str(value) == wanted) == (operator == "!="):
            return False
    return True


def handler(cluster: "Cluster") -> type[BaseHTTPRequestHandler]:
    """Returns a handler of requests to this cluster."""

    requests = Requests(cluster)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one packet: of two, the second waits 40 ms for the client

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if cluster.ended:  # its connections end with it
                self.close_connection = True
                return None
            with cluster.lock:
                answer = requests.answer(self.command, self.path, {k.title(): v for k, v in self.headers.items()}, body)
            self.send_response(answer.code)
            for warning in answer.warnings:
                self.send_header("Warning", f"299 - {json.dumps(warning)}")
            self.send_header("Content-Type", "text/plain" if isinstance(answer.body, str) else "application/json")
            if isinstance(answer.body, Iterator):
                return self._stream(answer.body)
            text = (answer.body if isinstance(answer.body, str) else json.dumps(answer.body)).encode()
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
            self.wfile.flush()

        do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _do

        def _stream(self, parts: Iterator[str]) -> None:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.flush()
            try:
                for part in parts:
                    text = part.encode()
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text) if text else b"")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            except ConnectionError:  # the client has enough
                self.close_connection = True

        def finish(self) -> None:
            try:
                super().finish()
            except ConnectionError:  # what is left to send goes nowhere
                self.rfile.close()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    return Handler
