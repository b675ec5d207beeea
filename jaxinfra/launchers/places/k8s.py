"""Runs a job on a Kubernetes cluster: a Job, JobSet or TrainJob, through the official client.

The cluster starts pods again by `manifests.failure_rules`, whether anybody watches or not.
"""

import math
import re
import subprocess
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from secrets import token_hex
from typing import override

from jaxinfra.errors import ConfigError, PeerLostError, Preempted
from jaxinfra.launchers.places.cluster_api import ClusterApi, end_of
from jaxinfra.launchers.places.job import Attempts, Job
from jaxinfra.launchers.places.manifests import (
    ATTEMPT_LABEL,
    GRACE_S,
    RUN_LABEL,
    SECRET_VARIABLE,
    WORKLOADS,
    Manifest,
    manifests,
    name_of,
    pods_of,
    run_label,
)
from jaxinfra.launchers.places.place import HostState, PlaceOptions, Say
from jaxinfra.launchers.places.scheduled import ScheduledPlace, ScheduledSource
from jaxinfra.launchers.restart_policy import INTERRUPTED, RULES
from jaxinfra.track.goodput import GOODPUT_FILE, account, read_ledger
from jaxinfra.track.runs import local_files

_QUEUES = ("kueue.x-k8s.io/v1beta1", "localqueues")


class Cluster(ScheduledSource):
    """The namespace of a cluster."""

    def __init__(self, options: PlaceOptions) -> None:
        """Reads the kubeconfig; raises ConfigError if there is none."""
        self.api = ClusterApi(options.context, options.namespace)
        name = f"namespace {self.api.namespace} of {self.api.server}"
        super().__init__(replace(options, namespace=self.api.namespace), name)


class KubernetesPlace(ScheduledPlace):
    """A run as one workload of a namespace."""

    def __init__(self, source: Cluster, say: Say) -> None:
        """Connects nothing yet."""
        super().__init__(source, say)
        self._api = source.api

    @property
    @override
    def started(self) -> str:
        return f"is a {self.source.options.workload} of {self.hosts[0]}"

    @override
    def prepare(self, job: Job, *, go_on: Callable[[], bool] = lambda: True) -> Mapping[str, str]:
        """Checks the queue, and has the cluster check what it gets; raises ConfigError for what it refuses."""
        self.hosts = self.source.current()
        if (queue := job.place.queue) and self._api.read(self._api.path(*_QUEUES, queue)) is None:
            names = [each["metadata"]["name"] for each in self._api.list(self._api.path(*_QUEUES))]
            fix = f"it has {', '.join(names)}" if names else "it has none; leave --queue out, or create a LocalQueue"
            raise ConfigError(f"--queue {queue}: namespace {self._api.namespace} has no such queue; {fix}")
        for manifest in manifests(job, 0, grace_s=GRACE_S):
            if manifest["kind"] != "TrainJob":  # which is refused before its runtime exists
                self._api.create(_kind(manifest), manifest, dry_run=True)
        return {"arch": ""}

    @override
    def ship(self, job: Job, attempts: Attempts) -> None:
        """Does nothing: pods take the code from the run directory, and packages are in the image."""

    @override
    def start(self, job: Job, number: int, *, left_s: float = 0.0) -> None:
        values = {**job.secret_values(), SECRET_VARIABLE: token_hex(32)}
        *others, workload = manifests(job, number, grace_s=_grace_s(job.location), left_s=left_s)
        data = {key: b64encode(value.encode()).decode() for key, value in values.items()}
        metadata = {"name": name_of(job, number), "labels": workload["metadata"]["labels"]}
        others.append({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
        for manifest in others:  # before the workload: whoever finds that finds all of it
            self._api.create(_kind(manifest), manifest)
        owner = _reference(self._api.create(_kind(workload), workload))
        for manifest in others:  # are deleted with it
            self._api.change(_kind(manifest), manifest, {"metadata": {"ownerReferences": [owner]}})

    def _newest(self, job: Job) -> tuple[int, Manifest | None]:
        """Returns number and workload of the newest attempt that the cluster has; 0 and None without one."""
        found = self._api.list(self._path(job), labelSelector=f"{RUN_LABEL}={run_label(job)}")
        numbered = [(int(each["metadata"]["labels"][ATTEMPT_LABEL]), each) for each in found]
        return max(numbered, key=lambda pair: pair[0], default=(0, None))

    def _path(self, job: Job, name: str = "") -> str:
        group, version, plural = WORKLOADS[job.place.workload]
        return self._api.path(f"{group}/{version}", plural, name)

    def _pods(self, job: Job, number: int) -> list[Manifest]:
        chosen = f"{RUN_LABEL}={run_label(job)},{ATTEMPT_LABEL}={number}"
        return self._api.list(self._api.path("v1", "pods"), labelSelector=chosen)

    @override
    def _state(self, job: Job) -> HostState:
        number, workload = self._newest(job)
        if workload is None:
            if not self._seen:
                return HostState(attempt=0, state="none")
            self._tell(f"{name_of(job, self._seen)} was deleted")
            return HostState(attempt=self._seen, state="ended", code=INTERRUPTED)
        self._seen = number
        if (end := end_of(workload)) is None:
            self._tell(self._progress(job, number, workload))
            return HostState(attempt=number, state="live")
        if end["type"] != "Failed":
            return HostState(attempt=number, state="ended", code=0)
        why = f"{end.get('reason')}: {end.get('message')}"
        self._tell(f"{workload['metadata']['name']} has failed: {why}")
        code = Preempted.exit_code if "DeadlineExceeded" in why else _code(self._pods(job, number))
        return HostState(attempt=number, state="ended", code=code)

    def _progress(self, job: Job, number: int, workload: Manifest) -> str:
        """Says how many pods run, and why others do not."""
        name, total = workload["metadata"]["name"], pods_of(job.place).count
        if workload["metadata"].get("deletionTimestamp"):
            return f"{name} is being deleted; its pods save"
        if workload["spec"].get("suspend"):
            return f"{name} waits in queue {job.place.queue}: {self._quota(workload)}"
        pods = self._pods(job, number)
        running = sum(each["status"].get("phase") == "Running" for each in pods)
        if running == total:
            again = sum(each["status"].get("phase") == "Failed" for each in pods)
            after = f", after {again} that ended" if again else ""
            return f"{name} runs {total} pod{'s' * (total > 1)}{after}"
        waiting = [why for each in pods if each["status"].get("phase") == "Pending" and (why := self._why(each))]
        if not pods:  # such as a quota, or a policy that lets none in
            waiting = self._warnings(job, workload)
        return f"{name} runs {running} of {total} pods{': ' * bool(waiting)}{'; '.join(dict.fromkeys(waiting))}"

    def _quota(self, workload: Manifest) -> str:
        """Returns why Kueue lets a workload wait."""
        uid = workload["metadata"].get("uid")
        for each in self._api.list(self._api.path(_QUEUES[0], "workloads")):
            if any(owner.get("uid") == uid for owner in each["metadata"].get("ownerReferences", [])):
                said = [one.get("message", "") for one in each.get("status", {}).get("conditions", [])]
                return said[-1] if said else "no quota yet"
        return "Kueue has not seen it yet"

    def _why(self, pod: Manifest) -> str:
        """Returns why a pod does not run; "" if it is about to."""
        status = pod["status"]
        for each in status.get("conditions", []):
            if each["type"] == "PodScheduled" and each["status"] == "False":
                return f"not scheduled: {each.get('message', each.get('reason', ''))}"
        for each in status.get("containerStatuses", []):
            waiting = each.get("state", {}).get("waiting", {})
            if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
                return f"{waiting['reason']}: {waiting.get('message', '')}".removesuffix(": ")
        return ""

    def _warnings(self, job: Job, workload: Manifest) -> list[str]:
        """Returns what controllers say of a workload without pods, the newest warning alone."""
        names = [workload["metadata"]["name"]]
        if job.place.workload != "job":  # its Jobs make the pods
            chosen = f"jobset.sigs.k8s.io/jobset-name={names[0]}"
            names = [each["metadata"]["name"] for each in self._api.list(self._jobs(), labelSelector=chosen)]
        events = self._api.path("v1", "events")
        said = [
            each
            for name in names
            for each in self._api.list(events, fieldSelector=f"involvedObject.name={name},type=Warning")
        ]
        message = " ".join(str(said[-1].get("message", "")).split()) if said else ""
        return [re.sub(r'pods "[^"]*"', "pods", message)] if said else []  # a name for each try

    def _jobs(self) -> str:
        group, version, plural = WORKLOADS["job"]
        return self._api.path(f"{group}/{version}", plural)

    @override
    def stop(self, job: Job, number: int, *, signal: str = "TERM") -> None:
        """Deletes the workload of an attempt after its pods, which save first; or at once."""
        pods = self._pods(job, number) if signal == "KILL" else []
        self._api.delete(self._path(job, name_of(job, number)))
        for pod in pods:
            self._api.delete(self._api.path("v1", "pods", pod["metadata"]["name"]), grace_s=0)

    @override
    def console(self, job: Job, *, rank: int = 0, lines: str = "+1", follow: bool) -> subprocess.Popen[bytes]:
        place, hosts = self.source.options, pods_of(job.place).hosts
        number = self._seen or self._newest(job)[0]
        labels = f"{RUN_LABEL}={run_label(job)},{ATTEMPT_LABEL}={number}"
        path = self._path(job, name_of(job, number))
        words = [place.context, place.namespace, path, labels, str(rank // hosts), str(rank % hosts), lines]
        return self._console("pod_log", *words, follow=follow)


def _grace_s(location: str) -> int:
    """Returns the seconds from SIGTERM to SIGKILL: three of the longest saves of the run so far, and a minute.

    The longest is one that the run has waited for, as at its end or when it was stopped. `GRACE_S` before the first.
    """
    with local_files(location, (GOODPUT_FILE,)) as folder:
        saves_s = account(read_ledger(folder / GOODPUT_FILE)).stalls_s
    return GRACE_S if not saves_s else math.ceil(60 + 3 * max(saves_s))


def _kind(manifest: Manifest) -> str:
    return "runtime" if manifest["kind"] == "TrainingRuntime" else manifest["kind"].lower()


def _reference(owner: Manifest) -> Manifest:
    metadata = owner["metadata"]
    named = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": metadata["name"], "uid": metadata["uid"]}
    return {**named, "blockOwnerDeletion": True}


def _code(pods: Sequence[Manifest]) -> int:
    """Returns the exit code of a run whose pods have failed: one that needs a person comes before all others."""
    codes = [
        each["state"]["terminated"]["exitCode"]
        for pod in pods
        for each in pod["status"].get("containerStatuses", [])
        if "terminated" in each.get("state", {})
    ]
    codes = [code for code in codes if code]
    final = [code for code in codes if (rule := RULES.get(code)) is not None and not rule.restarts]
    code = [*final, *codes[-1:], PeerLostError.exit_code][0]
    return code if code < 128 else PeerLostError.exit_code
