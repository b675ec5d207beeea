"""The nodes' part of the cluster: a pod is a process with a network, processes and a file system of its own.

A pod sees the file system of this machine, on which it writes to a layer in memory, so each image has this Python
with its packages. It runs as root whatever its `runAsUser`, reaches other pods and `Hosts.gateway`, and nothing else.
It has one container and no init containers, and its restart policy is Never.
"""

import base64
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cloud import leftovers
from tests.cloud.hosts import Hosts
from tests.cluster import objects
from tests.cluster.schemas import Json, Refused

if TYPE_CHECKING:
    from tests.cluster.server import Cluster

_PATH = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"  # here with a token that opens nothing
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork")


class _Waits(Exception):
    """Why a container does not start: the reason and the message of its status."""


class _Container(threading.Thread):
    """A process in namespaces of its own; the thread starts it, reads what it prints, and waits for its end."""

    def __init__(self, name: str, number: int, hosts: Hosts, script: Callable[[Path, int], str],
                 wake: Callable[[], None]) -> None:  # fmt: skip
        super().__init__(name=name, daemon=True)
        assert hosts.shared.parent.name in hosts.bridge
        self.folder, self.address = (
            hosts.shared.parent / name,
            f"{hosts.gateway.rpartition('.')[0]}.{100 + number % 150}",
        )
        self.hosts_file = hosts.shared.parent / f"{name}.hosts"
        self.started_at = self.ended_at = ""
        self.exit_code: int | None = None
        self.lines: list[tuple[datetime, str]] = []
        self.news = threading.Condition()
        self._link = f"{hosts.bridge[:-1]}p{number}"
        self._hosts, self._script, self._wake = hosts, script, wake
        self._first: int | None = None  # a descriptor of its first process
        self._signals: list[int] = []  # that it gets once it is there

    def run(self) -> None:
        self.folder.mkdir()
        told, tell = os.pipe()
        process = subprocess.Popen(
            [*_UNSHARE, "--kill-child=KILL", "bash", "-ec", self._script(self.folder, tell)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=[tell], start_new_session=True,
        )  # fmt: skip
        os.close(tell)
        assert process.stdin is not None and process.stdout is not None
        record = self.folder.with_suffix(".pid")
        with os.fdopen(told) as said, process.stdin as go:
            if first := said.readline():
                leftovers.record(record, int(first))
                leftovers.ip(f"link add {self._link} type veth peer name eth0 netns {process.pid}",
                             f"link set {self._link} master {self._hosts.bridge} up")  # fmt: skip
                leftovers.ip("link set lo up", f"address add {self.address}/24 dev eth0", "link set eth0 up",
                             namespace=process.pid)  # fmt: skip
                descriptor = os.pidfd_open(int(first))  # before it goes on, and maybe ends
                go.write(b"go\n")
                go.flush()  # before a signal ends who reads it
                self.started_at = objects.now()
                with self.news:
                    self._first = descriptor
                for each in self._signals:
                    self._send(each)
        self._wake()
        with process.stdout as output:
            for line in output:
                with self.news:
                    self.lines.append((datetime.now(UTC), line.decode(errors="replace").rstrip("\n")))
                    self.news.notify_all()
        code = process.wait()
        record.unlink(missing_ok=True)
        with self.news:
            if self._first is None:
                raise RuntimeError(f"{self.name}: the pod does not start: {self.lines}")
            os.close(self._first)
            self.ended_at = objects.now()
            self.exit_code = code if code >= 0 else 128 - code
            self.news.notify_all()
        self._wake()

    def stop(self, grace_s: float) -> None:
        """Has it end: SIGTERM to its first process, and after this time SIGKILL to all."""
        self._send(signal.SIGTERM if grace_s > 0 else signal.SIGKILL)
        timer = threading.Timer(grace_s, self._send, (signal.SIGKILL,))
        timer.daemon = True
        timer.start()

    def _send(self, number: int) -> None:
        with self.news:
            if self._first is None:
                self._signals.append(number)
            elif self.exit_code is None:
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    signal.pidfd_send_signal(self._first, number)


class Kubelet:
    """Runs the pods that are bound to nodes, and says how they do; the lock of the cluster is held in all calls."""

    def __init__(self, hosts: Hosts | None, wake: Callable[[], None]) -> None:
        self._hosts, self._wake = hosts, wake
        self._containers: dict[str, _Container] = {}  # by the uid of their pods
        self._lost: set[str] = set()
        self._names: dict[str, str] = {}  # what each pod knows of the others

    def close(self) -> None:
        """Ends all pods; without the lock."""
        for container in self._containers.values():
            container.stop(0)
        for container in self._containers.values():
            container.join()

    def runs(self, pod: Json) -> bool:
        """Whether there is a process that keeps a pod from being removed."""
        uid = pod["metadata"]["uid"]
        return uid in self._containers and uid not in self._lost and self._containers[uid].exit_code is None

    def stop(self, pod: Json) -> None:
        """Ends a pod that is being deleted, by its grace period."""
        if self.runs(pod):
            self._containers[pod["metadata"]["uid"]].stop(pod["metadata"]["deletionGracePeriodSeconds"])
        elif pod["status"]["phase"] == "Pending":
            pod["status"]["phase"] = "Failed"

    def lose(self, pod: Json) -> None:
        """Ends a pod whose node is gone, of which nobody says what became of it."""
        uid = pod["metadata"]["uid"]
        if self.runs(pod) or pod["status"]["phase"] == "Pending":
            if uid in self._containers:
                self._containers[uid].stop(0)
            pod["status"]["phase"] = "Failed"
            objects.disrupt(pod, "DeletionByPodGC", "PodGC: node no longer exists")
        self._lost.add(uid)
        pod["metadata"].setdefault("deletionTimestamp", objects.now())

    def shut_down(self, pod: Json, after_s: float) -> None:
        """Ends a pod whose node shuts down."""
        if self.runs(pod):
            message = "Pod was terminated in response to imminent node shutdown."
            objects.disrupt(pod, "TerminationByKubelet", message)
            pod["status"] |= {"reason": "Terminated", "message": message}
            self._containers[pod["metadata"]["uid"]].stop(min(pod["spec"]["terminationGracePeriodSeconds"], after_s))

    def sync(self, cluster: "Cluster") -> None:
        """Starts the pods that are due, and reports on those that have started."""
        for pod in cluster.find("pods"):
            meta, status = pod["metadata"], pod["status"]
            container = self._containers.get(meta["uid"])
            if container is not None and status["phase"] in ("Pending", "Running"):
                self._report(pod, container)
            elif container is None and status["phase"] == "Pending" and "nodeName" in pod["spec"]:
                self._start(cluster, pod)
        self._tell_names(cluster)

    def log(self, pod: Json, query: Mapping[str, str]) -> str | Iterator[str]:
        """Returns what a pod prints; with `follow` a stream that ends when it does."""
        meta, name = pod["metadata"], pod["spec"]["containers"][0]["name"]
        if query.get("container", name) != name:
            why = f"container {query['container']} is not valid for pod {meta['name']}"
            raise Refused(400, "BadRequest", why)
        if meta["uid"] in self._lost:
            where = f"https://{pod['spec']['nodeName']}:10250/containerLogs"
            raise Refused(500, "InternalError", f'Get "{where}": dial tcp: connect: no route to host')  # fmt: skip
        container = self._containers.get(meta["uid"])
        if container is None:
            if "nodeName" not in pod["spec"]:
                return ""
            state = pod["status"].get("containerStatuses", [{}])[0].get("state", {})
            why = state.get("waiting", {}).get("reason", "ContainerCreating")
            why = "trying and failing to pull image" if "Image" in why else why
            raise Refused(400, "BadRequest", f'container "{name}" in pod "{meta["name"]}" is waiting to start: {why}')
        return _log(container, query) if query.get("follow") in ("true", "True") else "".join(_log(container, query))

    def _report(self, pod: Json, container: _Container) -> None:
        spec, status = pod["spec"]["containers"][0], pod["status"]
        if not container.started_at:
            return
        ended, code = container.exit_code is not None, container.exit_code
        state: Json = {"running": {"startedAt": container.started_at}}
        if ended:
            state = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed",
                                    "startedAt": container.started_at, "finishedAt": container.ended_at}}  # fmt: skip
        failed = code != 0 or status.get("reason") == "Terminated"
        phase = ("Failed" if failed else "Succeeded") if ended else "Running"
        status |= {"phase": phase, "podIP": container.address, "podIPs": [{"ip": container.address}]}
        status["startTime"] = container.started_at
        status["containerStatuses"] = [
            {"name": spec["name"], "image": spec["image"], "imageID": spec["image"], "restartCount": 0,
             "ready": not ended, "started": not ended, "state": state, "lastState": {}}
        ]  # fmt: skip
        why = f"Pod{'Failed' if failed else 'Completed'}" if ended else ""
        for kind in ("Initialized", "ContainersReady", "Ready"):
            objects.set_condition(pod, kind, kind == "Initialized" or not ended, why)

    def _start(self, cluster: "Cluster", pod: Json) -> None:
        assert self._hosts is not None, "pods run on hosts: give some to the cluster"
        spec, meta, number = pod["spec"]["containers"][0], pod["metadata"], len(self._containers)
        policy = pod["spec"]["restartPolicy"]
        if len(pod["spec"]["containers"]) > 1 or "initContainers" in pod["spec"] or policy != "Never":
            raise NotImplementedError(
                f"{meta['name']}: the pods of this cluster have one container that never restarts"
            )
        try:
            image = spec["image"]
            if image not in cluster.images:
                failed = f'failed to pull and unpack image "{image}": failed to resolve reference "{image}": not found'
                objects.event(cluster, pod, "Warning", "Failed", f'Failed to pull image "{image}": {failed}')
                raise _Waits("ImagePullBackOff", f'Back-off pulling image "{image}": ErrImagePull: {failed}')
            hostname = pod["spec"].get("hostname", meta["name"])[:63]
            base = {
                "PATH": _PATH,
                "HOME": "/root",
                "LANG": "C.UTF-8",
                "HOSTNAME": hostname,
                **cluster.image_environment,
            }
            base |= {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "KUBERNETES_SERVICE_PORT": "443"}
            address = f"{self._hosts.gateway.rpartition('.')[0]}.{100 + number % 150}"
            environment = _environment(cluster, pod, base, {"status.podIP": address})
            words = [*(spec.get("command") or cluster.images[image])]
            words += spec.get("args", [] if spec.get("command") else [])
            command = [expanded(word, environment) for word in words]
            if not command:
                raise _Waits("CreateContainerError", "no command specified")
            volumes = {each["name"]: each for each in pod["spec"].get("volumes", ())}
            mounts = [(volumes[each["name"]], each) for each in spec.get("volumeMounts", ())]
            data = {each["name"]: _volume_data(cluster, pod, each) for each in volumes.values()}
            if pod["spec"].get("automountServiceAccountToken", True):
                mounts.append(({"name": "kube-api-access", "secret": {}}, {"mountPath": _ACCOUNT}))
                data["kube-api-access"] = {"token": "of-an-account", "namespace": meta["namespace"], "ca.crt": "none\n"}
        except _Waits as waits:
            reason, message = waits.args
            waiting = {"waiting": {"reason": reason, "message": message}}
            pod["status"]["containerStatuses"] = [
                {"name": spec["name"], "image": spec["image"], "imageID": "", "restartCount": 0, "ready": False,
                 "started": False, "state": waiting, "lastState": {}}
            ]  # fmt: skip
            return objects.event(cluster, pod, "Warning", "FailedMount" if "Mount" in message else "Failed", message)
        shared = self._hosts.shared

        def script(folder: Path, tell: int) -> str:
            root, binds = folder / "root", _own_mounts()
            for volume, mount in mounts:
                source = _source(folder, shared / "claims" / meta["namespace"], volume, data[volume["name"]])
                binds.append((source / mount.get("subPath", ""), mount["mountPath"]))
            hosts_file = folder.with_name(f"{folder.name}.hosts")
            hosts_file.write_text("127.0.0.1 localhost\n")
            lines = [
                f"echo {hostname} > /proc/sys/kernel/hostname",
                f"mkdir {folder}/disk",
                f"mount -t tmpfs pod {folder}/disk",
                f"mkdir {root} {folder}/disk/upper {folder}/disk/work",
                f"mount -t overlay pod -o lowerdir=/,upperdir={folder}/disk/upper,workdir={folder}/disk/work {root}",
            ]
            for source, target in binds:
                where = shlex.quote(f"{root}{Path(target).resolve()}")  # links lead to `/`, also those below root
                lines += [f"mkdir -p {where}", f"mount --rbind {shlex.quote(str(source))} {where}"]
                lines += [f"mount -t tmpfs -o size=64m shm {where}/shm"] if target == "/dev" else []
            variables = [f"{key}={value}" for key, value in environment.items()]
            inside = ["env", "-i", f"--chdir={spec.get('workingDir', '/')}", *variables, *command]
            lines += [f"mount --bind {hosts_file} {root}/etc/hosts", "read first rest < /proc/self/stat",
                      f"mount -t proc proc {root}/proc", f"echo $first >&{tell}", f"exec {tell}>&-", "read go",
                      f"exec chroot {root} {shlex.join(inside)} < /dev/null"]  # fmt: skip
            return "\n".join(lines)

        container = _Container(meta["uid"], number, self._hosts, script, self._wake)
        self._containers[meta["uid"]] = container
        pod["status"]["hostIP"] = self._hosts.gateway
        container.start()

    def _tell_names(self, cluster: "Cluster") -> None:
        """Has each pod know its own name, and those of the pods of headless services in its namespace."""
        named: dict[str, list[str]] = {}
        running = [pod for pod in cluster.find("pods") if self.runs(pod) and "podIP" in pod["status"]]
        for pod in running:
            space, subdomain = pod["metadata"]["namespace"], pod["spec"].get("subdomain", "")
            service = cluster.objects.get(("services", space, subdomain), {}).get("spec", {})
            labels, selector = pod["metadata"].get("labels", {}), service.get("selector", {})
            if service.get("clusterIP") == "None" and selector and selector.items() <= labels.items():
                short = f"{pod['spec'].get('hostname')}.{subdomain}"
                line = f"{pod['status']['podIP']} {short}.{space}.svc.cluster.local {short}.{space}.svc {short}"
                named.setdefault(space, []).append(line)
        for pod in running:
            own = f"{pod['status']['podIP']} {pod['spec'].get('hostname', pod['metadata']['name'])}"
            text = "\n".join(["127.0.0.1 localhost", *named.get(pod["metadata"]["namespace"], []), own, ""])
            if self._names.get(uid := pod["metadata"]["uid"]) != text:
                self._names[uid] = text
                with self._containers[uid].hosts_file.open("r+b") as file:  # in place: the pod has it by its inode
                    os.pwrite(file.fileno(), text.encode(), 0)
                    file.truncate(len(text.encode()))


def _log(container: _Container, query: Mapping[str, str]) -> Iterator[str]:
    since = datetime.min.replace(tzinfo=UTC)
    if "sinceTime" in query:
        since = datetime.fromisoformat(query["sinceTime"])
    if "sinceSeconds" in query:
        since = datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"]))
    at = max(len(container.lines) - int(query["tailLines"]), 0) if "tailLines" in query else 0
    while True:
        with container.news:
            while (
                query.get("follow") in ("true", "True") and at == len(container.lines) and container.exit_code is None
            ):
                container.news.wait(1.0)
            lines = container.lines[at:]
            at += len(lines)
        stamped = query.get("timestamps") in ("true", "True")
        for when, line in lines:
            if when >= since:
                yield (f"{when.isoformat().replace('+00:00', 'Z')} " if stamped else "") + line + "\n"
        if not lines or query.get("follow") not in ("true", "True"):
            return


def _own_mounts() -> list[tuple[Path, str]]:
    """Returns what else is mounted on this machine: a layer upon `/` does not have it."""
    found = ["/proc"]  # of which a pod gets its own
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4]
        if point != "/" and Path(point).is_dir() and not any(f"{point}/".startswith(f"{each}/") for each in found):
            found.append(point)
    return [(Path(point), point) for point in found[1:]]


def _environment(cluster: "Cluster", pod: Json, base: Mapping[str, str], known: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of a container, as kubelet makes them."""
    spec, meta = pod["spec"]["containers"][0], pod["metadata"]
    found = dict(base)
    for each in spec.get("envFrom", ()):
        kind, ref = ("secrets", each["secretRef"]) if "secretRef" in each else ("configmaps", each["configMapRef"])
        values = _data(cluster, kind, meta["namespace"], ref)
        found |= {each.get("prefix", "") + key: value for key, value in values.items()}
    for each in spec.get("env", ()):
        source = each.get("valueFrom") or {}
        if "fieldRef" in source:
            found[each["name"]] = _field(pod, source["fieldRef"]["fieldPath"], known)
        elif refs := [key for key in ("secretKeyRef", "configMapKeyRef") if key in source]:
            ref, kind = source[refs[0]], refs[0].removesuffix("KeyRef")
            values = _data(cluster, f"{kind.lower()}s", meta["namespace"], ref)
            if ref["key"] in values:
                found[each["name"]] = values[ref["key"]]
            elif not ref.get("optional"):
                what = f"{kind[0].upper()}{kind[1:]} {meta['namespace']}/{ref['name']}"
                raise _Waits("CreateContainerConfigError", f"couldn't find key {ref['key']} in {what}")
        elif source:
            raise NotImplementedError(f"{meta['name']}: {source}: expected fieldRef, secretKeyRef or configMapKeyRef")
        else:
            found[each["name"]] = expanded(each.get("value", ""), found)
    return found


def _field(pod: Json, path: str, known: Mapping[str, str]) -> str:
    if path in known:
        return known[path]
    if found := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return pod["metadata"].get(found[1], {}).get(found[2], "")
    value: Any = pod
    for word in path.split("."):
        value = value[word]
    return str(value)


def _data(cluster: "Cluster", plural: str, namespace: str, ref: Json) -> dict[str, str]:
    """Returns what a Secret or a ConfigMap has, as text."""
    found = cluster.objects.get((plural, namespace, ref["name"]))
    if found is None and not ref.get("optional"):
        raise _Waits("CreateContainerConfigError", f'{plural[:-1]} "{ref["name"]}" not found')
    values = (found or {}).get("data", {})
    return {key: base64.b64decode(value).decode() if plural == "secrets" else value for key, value in values.items()}


def _volume_data(cluster: "Cluster", pod: Json, volume: Json) -> dict[str, str]:
    """Returns the files of a volume that has some from the start."""
    source = volume.get("secret") or volume.get("configMap")
    if source is None:
        return {}
    ref = source | {"name": source.get("secretName") or source.get("name")}
    plural = "secrets" if "secret" in volume else "configmaps"
    try:
        values = _data(cluster, plural, pod["metadata"]["namespace"], ref)
    except _Waits as waits:
        message = f'MountVolume.SetUp failed for volume "{volume["name"]}" : {waits.args[1]}'
        raise _Waits("ContainerCreating", message) from None
    items = source.get("items")
    return values if items is None else {item["path"]: values[item["key"]] for item in items}


def _source(folder: Path, claims: Path, volume: Json, data: Mapping[str, str]) -> Path:
    """Returns the folder of a volume, which is there."""
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    if "persistentVolumeClaim" in volume:
        path = claims / volume["persistentVolumeClaim"]["claimName"]
    elif volume.keys() & {"emptyDir", "secret", "configMap"}:
        path = folder / "volumes" / volume["name"]
    else:
        raise NotImplementedError(f"{volume}: expected emptyDir, secret, configMap, hostPath or a claim")
    path.mkdir(parents=True, exist_ok=True)
    for name, text in data.items():
        (path / name).write_text(text)
    return path


def expanded(word: str, environment: Mapping[str, str]) -> str:
    """Returns a word with the values of its $(VARIABLES); $$ is a dollar sign, unknown ones stay."""
    return re.sub(
        r"\$(\$|\(([A-Za-z_.-][\w.-]*)\))",
        lambda found: "$" if found[1] == "$" else environment.get(found[2], found[0]), word,
    )  # fmt: skip
