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
import secrets
import threading
import uuid
from collections.abc import Mapping, Sequence
from copy import deepcopy
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.cloud.hosts import Hosts
from tests.cluster import controllers, objects, pod_security, queues, scheduler
from tests.cluster.pods import Kubelet
from tests.cluster.requests import OPERATORS, handler
from tests.cluster.schemas import BY_NAME, KINDS, Json, Kind, Refused, check, decode, denied, forbidden, not_found

QUEUE = "kueue.x-k8s.io/queue-name"


class Cluster:
    """The cluster, and the switches by which a test makes its days bad."""

    def __init__(self, hosts: Hosts | None = None, *, installed: Sequence[str] = OPERATORS) -> None:
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
        self.broken: Exception | None = None
        self.kubelet = Kubelet(hosts, self.wake)
        self.events: list[tuple[int, str, str, Json]] = []  # version, type, plural, object, for who watches
        self._published: dict[tuple[str, str, str], str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
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
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": objects.now(), "generation": 1}
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
        meta.setdefault("deletionTimestamp", objects.now())
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
        before = len(self.events)
        for key in [*self._published]:
            if key not in self.objects:
                gone = json.loads(self._published.pop(key))
                self._tell("DELETED", key[0], gone)
        for key, body in self.objects.items():
            text = json.dumps(body)
            if self._published.get(key) != text:
                self._tell("MODIFIED" if key in self._published else "ADDED", key[0], body)
                self._published[key] = json.dumps(body)
        if before != len(self.events):
            self.changed.notify_all()
        return before != len(self.events)

    @property
    def has_queues(self) -> bool:
        """Whether Kueue is installed."""
        return "kueue.x-k8s.io" in self.installed

    def _tell(self, event: str, plural: str, body: Json) -> None:
        version = len(self.events) + 1000
        body["metadata"]["resourceVersion"] = str(version)
        self.events.append((version, event, plural, deepcopy(body)))

    def _control(self) -> None:
        with self.lock:
            while not self.ended:
                try:
                    controllers.reconcile(self)
                except Exception as error:
                    self.broken = error
                    raise
                if not self.publish():
                    self.changed.wait(0.2)  # for deadlines

    def _each_workload(self, name: str, *, admitted: bool) -> None:
        with self.lock:
            for workload in self.find("workloads"):
                if fnmatch.fnmatchcase(workload["metadata"]["ownerReferences"][0]["name"], name):
                    queues.set_admitted(self, workload, admitted=admitted)
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
        if exceeded := scheduler.exceeded_quota(self, body):
            raise forbidden(kind, name, exceeded)
        return []
