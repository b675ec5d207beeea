"""A Kubernetes cluster on this machine: its API over HTTP, controllers, and pods that are processes.

    with Hosts() as hosts, Cluster(hosts) as cluster:
        cluster.add_node("tpu-0", labels={...}, capacity={"google.com/tpu": 4})
        cluster.images["registry.example/train:1"] = []
        ...  # with KUBECONFIG=cluster.kubeconfig(path)
        cluster.lose_node("tpu-0")

Without hosts there is the API and its controllers alone. It answers as the API server does of which it has the types;
all objects are dicts, a change of which `publish` finds by itself.
"""

import base64
import fnmatch
import json
import re
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.cloud.hosts import Hosts
from tests.cluster import controllers, pod_security
from tests.cluster.pods import Kubelet
from tests.cluster.schemas import BY_NAME, KINDS, Json, Kind, Refused, check, decode, denied, forbidden, not_found

QUEUE = "kueue.x-k8s.io/queue-name"
_BUILT_IN = ("", "batch", "scheduling.k8s.io")
_OPERATORS = ("jobset.x-k8s.io", "trainer.kubeflow.org", "kueue.x-k8s.io")
_PRESERVED = (
    "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them "
    "or set propagationPolicy=Orphan to suppress this warning"
)


class _Answer(NamedTuple):
    """What a request gets: JSON, text, or parts of a stream."""

    code: int
    body: Json | str | Iterator[str]
    warnings: Sequence[str] = ()


class Cluster:
    """The cluster, and the switches by which a test makes its days bad."""

    def __init__(self, hosts: Hosts | None = None, *, installed: Sequence[str] = _OPERATORS) -> None:
        self.token, self.user = secrets.token_hex(16), "ada"
        self.installed = installed  # groups of operators
        self.denied: set[str] = set()  # such as "create jobs.batch", "get pods/log", "* secrets"
        self.images: dict[str, Sequence[str]] = {}  # entrypoints of the images that nodes can pull
        self.image_environment = {"PYTHONPATH": str(Path(__file__).parents[2])}  # of all images, beside PATH and so on
        self.requests: list[tuple[str, str, Any]] = []  # method, path with its query, body
        self.quotas: dict[str, Mapping[str, float]] = {}  # what a ClusterQueue has of each resource
        self.objects: dict[tuple[str, str, str], Json] = {}  # by plural, namespace ("" for none) and name
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.made = 0  # pods of Jobs
        self.ended = False
        self._broken: Exception | None = None
        self.kubelet = Kubelet(hosts, self.wake)
        self._events: list[tuple[int, str, str, Json]] = []  # version, type, plural, object, for who watches
        self._published: dict[tuple[str, str, str], str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.add_namespace("default")

    def __enter__(self) -> Self:
        self._controllers = threading.Thread(target=self._control, name="controllers", daemon=True)
        self._controllers.start()
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self.wake()
        self._controllers.join()
        self.kubelet.close()
        self._server.shutdown()
        self._server.server_close()

    # What tests do with it

    def kubeconfig(self, path: Path, namespace: str = "default") -> Path:
        """Writes how clients reach it."""
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "tests",
            "clusters": [{"name": "tests", "cluster": {"server": self.endpoint}}],
            "users": [{"name": self.user, "user": {"token": self.token}}],
            "contexts": [
                {"name": "tests", "context": {"cluster": "tests", "user": self.user, "namespace": namespace}}
            ],
        }  # fmt: skip
        path.write_text(json.dumps(config))
        return path

    def add(self, kind: str, name: str, namespace: str = "", **parts: Any) -> None:
        """Makes any object, such as a runtime of TrainJobs: `parts` are its spec and so on."""
        meta = {"name": name, **({"namespace": namespace} if namespace else {}), **parts.pop("metadata", {})}
        body = {"apiVersion": BY_NAME[kind].api_version, "kind": kind, "metadata": meta, **parts}
        with self.lock:
            self.create(BY_NAME[kind], body, validation="Strict")

    def add_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> None:
        """Makes a namespace; `pod_security.ENFORCE` is a label that restricts its pods."""
        self.add("Namespace", name, metadata={"labels": {**(labels or {})}})
        self.add("ServiceAccount", "default", name)

    def add_node(
        self, name: str, *, labels: Mapping[str, str] | None = None, capacity: Mapping[str, object] | None = None,
        taints: Sequence[Json] = (),
    ) -> None:  # fmt: skip
        """Makes a node that is ready."""
        amounts = {"cpu": "64", "memory": "256Gi", "pods": "110"} | {k: str(v) for k, v in (capacity or {}).items()}
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady"}
        self.add("Node", name, metadata={"labels": {"kubernetes.io/hostname": name, **(labels or {})}},
                 spec={"taints": [*taints]},
                 status={"capacity": amounts, "allocatable": amounts, "conditions": [ready]})  # fmt: skip

    def add_queue(self, name: str, namespace: str = "default", quota: Mapping[str, float] | None = None) -> None:
        """Makes a LocalQueue with a ClusterQueue of its own; without quota all wait for `admit`."""
        self.quotas[name] = quota or {}
        self.add("ClusterQueue", name)
        self.add("LocalQueue", name, namespace, spec={"clusterQueue": name})

    def admit(self, name: str = "*") -> None:
        """Has the queues admit workloads of this name of their Job, JobSet or TrainJob, whatever the quota."""
        self._each_workload(name, admitted=True)

    def requeue(self, name: str = "*") -> None:
        """Has the queues take back what they have admitted, as they do for a workload of higher priority."""
        self._each_workload(name, admitted=False)

    def lose_node(self, name: str) -> None:
        """Ends a node without a word; its pods end at once, and the cluster finds later that it is gone."""
        with self.lock:
            self.objects.pop(("nodes", "", name))
            for pod in self.pods_on(name):
                self.kubelet.lose(pod)
        self.wake()

    def preempt_node(self, name: str, after_s: float = 25.0) -> None:
        """Has a node shut down as Spot capacity does: its pods get SIGTERM, and the node is lost after this time."""
        with self.lock:
            self.objects[("nodes", "", name)]["spec"]["unschedulable"] = True
            for pod in self.pods_on(name):
                self.kubelet.shut_down(pod, after_s)
        self.wake()
        timer = threading.Timer(after_s, self.lose_node, (name,))
        timer.daemon = True
        timer.start()

    # What controllers and pods ask of it; the lock is held

    def wake(self) -> None:
        """Has the controllers look at all objects again."""
        with self.lock:
            self.changed.notify_all()

    def find(self, plural: str, namespace: str | None = None, owner: Json | None = None) -> list[Json]:
        """Returns the objects of a kind, of a namespace, of an owner."""
        uid = owner and owner["metadata"]["uid"]
        return [
            each for (kind, where, _), each in self.objects.items()
            if kind == plural and namespace in (None, where)
            and (uid is None or any(of["uid"] == uid for of in each["metadata"].get("ownerReferences", ())))
        ]  # fmt: skip

    def pods_on(self, node: str) -> list[Json]:
        """Returns the pods that a node has."""
        return [pod for pod in self.find("pods") if pod["spec"].get("nodeName") == node]

    def create(self, kind: Kind, body: Json, *, validation: str = "Ignore", dry_run: bool = False) -> list[str]:
        """Admits an object, which becomes `body`, or refuses it; returns warnings."""
        meta, prefix = body.setdefault("metadata", {}), ""
        if "name" not in meta and (prefix := meta.get("generateName", "")):
            meta["name"] = f"{prefix[:58]}{secrets.token_hex(3)[:5]}"
        namespace = meta.get("namespace", "") if kind.namespaced else ""
        if kind.namespaced and ("namespaces", "", namespace) not in self.objects:
            raise not_found(BY_NAME["Namespace"], namespace)
        warnings = decode(kind, body, validation)
        if "name" not in meta:
            raise Refused(422, "Invalid", f'{kind.kind} "" is invalid: metadata.name: Required value: name or '
                          "generateName is required")  # fmt: skip
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": controllers.now(), "generation": 1}
        if kind.kind != "Node":
            body.pop("status", None)
        if kind.kind == "Secret" and "stringData" in body:
            coded = {key: base64.b64encode(value.encode()).decode() for key, value in body.pop("stringData").items()}
            body["data"] = body.get("data", {}) | coded
        if kind.kind in ("Job", "JobSet", "TrainJob") and QUEUE in meta.get("labels", {}) and self.has_queues:
            body["spec"]["suspend"] = True
        check(kind, body)
        if kind.kind == "TrainJob":
            self._require_runtime(body)
        warnings += self._admit_pods(kind, body, namespace)
        key = (kind.plural, namespace, meta["name"])
        if key in self.objects:
            details = {"name": meta["name"], "group": kind.group, "kind": kind.plural}
            raise Refused(409, "AlreadyExists", f'{kind.resource} "{meta["name"]}" already exists', details)
        if not dry_run:
            if kind.kind in ("Pod", "Job"):
                body["status"] = {"phase": "Pending"} if kind.kind == "Pod" else {}
            self.objects[key] = body
            self.publish()
        return warnings

    def delete(self, body: Json, policy: str = "Background", grace_s: float | None = None) -> None:
        """Deletes an object, now or when its finalizers and its process are gone; see `controllers.collect`."""
        meta = body["metadata"]
        for each in self.find_dependents(body) if policy == "Orphan" else ():
            owners = each["metadata"]["ownerReferences"]
            each["metadata"]["ownerReferences"] = [of for of in owners if of["uid"] != meta["uid"]]
            each["metadata"].pop("finalizers", None)
        meta.setdefault("deletionTimestamp", controllers.now())
        if policy == "Foreground" and "foregroundDeletion" not in meta.setdefault("finalizers", []):
            meta["finalizers"].append("foregroundDeletion")
        if body["kind"] == "Pod":
            grace_s = body["spec"]["terminationGracePeriodSeconds"] if grace_s is None else grace_s
            meta["deletionGracePeriodSeconds"] = min(grace_s, meta.get("deletionGracePeriodSeconds", grace_s))
            self.kubelet.stop(body)
        controllers.collect(self)
        self.publish()

    def find_dependents(self, owner: Json) -> list[Json]:
        """Returns what an object owns."""
        return [each for plural in {kind.plural for kind in KINDS} for each in self.find(plural, owner=owner)]

    def publish(self) -> bool:
        """Gives what has changed a new version, and tells who watches; returns whether anything has."""
        before = len(self._events)
        for key in [*self._published]:
            if key not in self.objects:
                gone = json.loads(self._published.pop(key))
                self._tell("DELETED", key[0], gone)
        for key, body in self.objects.items():
            text = json.dumps(body)
            if self._published.get(key) != text:
                self._tell("MODIFIED" if key in self._published else "ADDED", key[0], body)
                self._published[key] = json.dumps(body)
        if before != len(self._events):
            self.changed.notify_all()
        return before != len(self._events)

    @property
    def has_queues(self) -> bool:
        """Whether Kueue is installed."""
        return "kueue.x-k8s.io" in self.installed

    def _tell(self, event: str, plural: str, body: Json) -> None:
        version = len(self._events) + 1000
        body["metadata"]["resourceVersion"] = str(version)
        self._events.append((version, event, plural, deepcopy(body)))

    def _control(self) -> None:
        with self.lock:
            while not self.ended:
                try:
                    controllers.reconcile(self)
                except Exception as error:
                    self._broken = error
                    raise
                if not self.publish():
                    self.changed.wait(0.2)  # for deadlines

    def _each_workload(self, name: str, *, admitted: bool) -> None:
        with self.lock:
            for workload in self.find("workloads"):
                if fnmatch.fnmatchcase(workload["metadata"]["ownerReferences"][0]["name"], name):
                    controllers.set_admitted(self, workload, admitted=admitted)
            self.publish()

    # Admission

    def _require_runtime(self, body: Json) -> None:
        ref, meta = body["spec"]["runtimeRef"], body["metadata"]
        kind = BY_NAME[ref["kind"]]
        if (kind.plural, meta["namespace"] if kind.namespaced else "", ref["name"]) not in self.objects:
            why = f'spec.runtimeRef: Invalid value: {kind.resource} "{ref["name"]}" not found: '
            why += f"specified {kind.kind[0].lower()}{kind.kind[1:]} must be created before the TrainJob is created"
            raise denied("validator.trainjob.trainer.kubeflow.org", why)

    def _admit_pods(self, kind: Kind, body: Json, namespace: str) -> list[str]:
        """Refuses pods that the namespace does not let in; for a Job whose pods it will not let in, a warning."""
        if kind.kind not in ("Pod", "Job"):
            return []
        spec = body["spec"] if kind.kind == "Pod" else body["spec"]["template"]["spec"]
        labels = self.objects[("namespaces", "", namespace)]["metadata"].get("labels", {})
        broken = pod_security.broken(spec) if labels.get(pod_security.ENFORCE) == "restricted" else ""
        if kind.kind == "Job":
            return [f'would violate PodSecurity "restricted:latest": {broken}'] if broken else []
        name = body["metadata"]["name"]
        if broken:
            raise forbidden(kind, name, f'violates PodSecurity "restricted:latest": {broken}')
        account = spec.setdefault("serviceAccountName", "default")
        if ("serviceaccounts", namespace, account) not in self.objects:
            why = f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found'
            raise forbidden(kind, name, why)
        priority = spec.get("priorityClassName", "")
        if priority and not priority.startswith("system-") and ("priorityclasses", "", priority) not in self.objects:
            raise forbidden(kind, name, f"no PriorityClass with name {priority} was found")
        if exceeded := controllers.exceeded_quota(self, body):
            raise forbidden(kind, name, exceeded)
        return []

    # Requests

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> _Answer:
        """Returns the answer to a request; the lock is held."""
        parts = urlsplit(path)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        try:
            parsed: Any = json.loads(body) if body else {}
            self.requests.append((method, path, deepcopy(parsed)))
            if self._broken is not None:  # rather than have clients wait for what will not come
                raise Refused(500, "InternalError", f"the controllers of this cluster of tests ended: {self._broken!r}")
            if headers.get("Authorization") != f"Bearer {self.token}":
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
        known = [kind for kind in KINDS if kind.group in (*_BUILT_IN, *self.installed)]
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
        return not any(fnmatch.fnmatchcase(f"{verb} {what}", pattern) for pattern in self.denied)

    def _serve(self, method: str, words: Sequence[str], query: Mapping[str, str], body: Json, of: str) -> _Answer:
        start, version = (2, "v1") if words[0] == "api" else (3, "/".join(words[1:3]))
        rest, namespace = [*words[start:]], None
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        kind = next((k for k in KINDS if k.api_version == version and [k.plural] == rest[:1]), None)
        if kind is None or kind.group not in (*_BUILT_IN, *self.installed) or len(rest) > 3:
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
            warnings = self.create(kind, body, validation=query.get("fieldValidation") or "Warn",
                                   dry_run=query.get("dryRun") == "All")  # fmt: skip
            return _Answer(201, deepcopy(body), warnings)
        if verb == "watch":
            return _Answer(200, self._watch(kind, namespace, query))
        if not name:
            found = [each for each in self.find(kind.plural, namespace) if _matches(each, query)]
            for each in found if method == "DELETE" else ():
                self.delete(each)
            items = [deepcopy(each) | {"apiVersion": kind.api_version} for each in found]
            meta = {"resourceVersion": str(len(self._events) + 999)}
            return _Answer(200, {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": meta,
                                 "items": items})  # fmt: skip
        found = self.objects.get((kind.plural, namespace or "", name))
        if found is None:
            raise not_found(kind, name)
        if sub == "log":
            return _Answer(200, self.kubelet.log(found, query))
        if sub == "eviction" and method == "POST":
            controllers.disrupt(found, "EvictionByEvictionAPI", "Eviction API: evicting")
            self.delete(found, grace_s=(body.get("deleteOptions") or {}).get("gracePeriodSeconds"))
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
            why = f'User "{self.user}" cannot {verb} resource "{kind.plural}{sub and "/" + sub}" in API group '
            why += f'"{kind.group}" {where}'
            raise Refused(403, "Forbidden", f"{kind.resource}{name and f' "{name}"'} is forbidden: {why}",
                          {"name": name, "group": kind.group, "kind": kind.plural})  # fmt: skip

    def _delete(self, kind: Kind, found: Json, query: Mapping[str, str], body: Json) -> _Answer:
        options = {**query, **body}
        policy = options.get("propagationPolicy")
        grace_s = options.get("gracePeriodSeconds")
        orphans = kind.kind == "Job" and policy is None
        self.delete(found, policy or ("Orphan" if orphans else "Background"), None if grace_s is None else int(grace_s))
        warnings = [_PRESERVED] if orphans else []
        if any(each is found for each in self.objects.values()):  # finalizers or a process hold it
            return _Answer(200, deepcopy(found), warnings)
        details = {"name": found["metadata"]["name"], "group": kind.group, "kind": kind.plural}
        done = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}
        return _Answer(200, done, warnings)

    def _update(self, kind: Kind, found: Json, body: Any, query: Mapping[str, str], patch: str) -> None:
        accepted = ["application/merge-patch+json"]
        accepted += [] if kind.group in _OPERATORS else ["application/strategic-merge-patch+json"]  # as a plain one
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
        self.publish()

    def _watch(self, kind: Kind, namespace: str | None, query: Mapping[str, str]) -> Iterator[str]:
        """Yields what changes, as a line of JSON each."""
        deadline = time.monotonic() + float(query.get("timeoutSeconds") or 1800)
        with self.lock:
            since, at = query.get("resourceVersion") or "0", len(self._events)
            present = [("ADDED", deepcopy(each)) for each in self.find(kind.plural, namespace)] if since == "0" else []
            at = at if since == "0" else next((n for n, event in enumerate(self._events) if event[0] > int(since)), at)
        while True:
            for event, body in present:
                if namespace in (None, body["metadata"].get("namespace")) and _matches(body, query):
                    yield json.dumps({"type": event, "object": body | {"apiVersion": kind.api_version}}) + "\n"
            with self.lock:
                while at == len(self._events) and not self.ended and time.monotonic() < deadline:
                    self.changed.wait(min(1.0, max(deadline - time.monotonic(), 0.0)))
                if at == len(self._events):
                    return
                present = [(event, body) for _, event, plural, body in self._events[at:] if plural == kind.plural]
                at = len(self._events)


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


def _handler(cluster: Cluster) -> type[BaseHTTPRequestHandler]:
    """Returns a handler of requests to this cluster."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # header and body in one packet: of two, the second waits 40 ms for the client

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with cluster.lock:
                answer = cluster.answer(self.command, self.path, {k.title(): v for k, v in self.headers.items()}, body)
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
