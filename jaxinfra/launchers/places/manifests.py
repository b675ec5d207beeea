"""Writes the manifests of a run for Kubernetes: a Job, a JobSet, or a TrainJob with its runtime, as plain objects.

Pods need no root, and pass the pod security standard "restricted". Which exit codes start a pod again is that of
`restart_policy`: a pod whose code needs a person fails the run; all that the outside brings about, such as an eviction
or a signal, starts it again, and is not counted.

Sources: the API of Kubernetes (batch/v1), JobSet (v1alpha2), Kubeflow Trainer (v1alpha1), Kueue's labels, and the node
labels of "Plan TPUs in GKE" and of NVIDIA's GPU feature discovery.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.bundle import short_hash
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.restart_policy import RULES
from jaxinfra.plan.topology import MAX_DEVICES, Topology, parse_topology

type Manifest = dict[str, Any]

RUN_LABEL, ATTEMPT_LABEL = "jaxinfra.dev/run", "jaxinfra.dev/attempt"
SECRET_VARIABLE = "JAXINFRA_SECRET"
"""By which the processes of a start know each other."""
CONTAINER = "node"  # as Kubeflow's runtimes name it
WORKLOADS = {  # group, version and plural of what the API calls a kind
    "job": ("batch", "v1", "jobs"),
    "jobset": ("jobset.x-k8s.io", "v1alpha2", "jobsets"),
    "trainjob": ("trainer.kubeflow.org", "v1alpha1", "trainjobs"),
    "runtime": ("trainer.kubeflow.org", "v1alpha1", "trainingruntimes"),
}
GRACE_S = 300
"""Seconds from SIGTERM to SIGKILL, before a save of the run was measured."""
_KEPT_S = 7 * 86_400  # from the end of a run until the cluster deletes its pods, and with them their logs
_RETRIES = 6  # for codes of no meaning, such as 127 of an image without Python
_RESTARTS = 20  # of all pods of a JobSet together
_PORT = 8476
_USER = 1000  # of launch/Dockerfile
_SIGNALS = range(1, 32)  # a shell and Kubernetes report a death by signal as 128 + its number
_SCRATCH = "/scratch"
_TOLD = {"JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS", "JOBSET_JOB_INDEX", "JOBSET_REPLICAS", SECRET_VARIABLE}


@dataclass(frozen=True, kw_only=True)
class _Tpu:
    """A TPU of GKE."""

    name: str  # label of its nodes
    single: Mapping[tuple[int, ...], int]  # chips of the slices that are one host
    per_host: int = 4  # chips of a host in larger slices


_ONE_HOST = {(1, 1): 1, (2, 2): 4, (2, 4): 8}
_TPUS = {
    "v4": _Tpu(name="tpu-v4-podslice", single={(2, 2, 1): 4}),
    "v5e": _Tpu(name="tpu-v5-lite-podslice", single=_ONE_HOST),
    "v5p": _Tpu(name="tpu-v5p-slice", single={(2, 2, 1): 4}),
    "v6e": _Tpu(name="tpu-v6e-slice", single=_ONE_HOST),
    "tpu7x": _Tpu(name="tpu7x", single={(2, 2, 1): 4}),
}
_GPUS = {  # labels of nodes: of GKE, and of GPU feature discovery
    "a100": (["nvidia-a100-80gb"], ["NVIDIA-A100-SXM4-80GB"]),
    "h100": (["nvidia-h100-80gb", "nvidia-h100-mega-80gb"], ["NVIDIA-H100-80GB-HBM3"]),
    "h200": (["nvidia-h200-141gb"], ["NVIDIA-H200"]),
    "b200": (["nvidia-b200"], ["NVIDIA-B200"]),
}


@dataclass(frozen=True, kw_only=True)
class Pods:
    """The pods of a run, and what each asks of its node."""

    hosts: int  # pods of a slice
    slices: int = 1
    limits: Mapping[str, int]  # resources of a pod
    selector: Mapping[str, str]  # labels of nodes, all of them
    any_of: Sequence[Mapping[str, list[str]]] = ()  # labels of nodes, of which one must fit
    devices: int = 0  # of JAX, in all; 0 if unknown
    is_tpu: bool = False

    @property
    def count(self) -> int:
        """The number of processes."""
        return self.hosts * self.slices


def pods_of(place: PlaceOptions) -> Pods:
    """Returns the pods of `--accelerator`; raises ConfigError for chips that Kubernetes has no name for."""
    text = place.accelerator
    if match := re.fullmatch(r"cpu(?::([1-9]\d*))?", text):
        if (count := int(match[1] or 1)) > MAX_DEVICES:
            raise ConfigError(f"--accelerator {text}: has {count:,} processes; use {MAX_DEVICES:,} or fewer")
        return Pods(hosts=count, limits={}, selector={})
    if text.partition(":")[0] == "cpu":
        raise ConfigError(f"--accelerator {text}: expected cpu:N, for N pods or workers without chips; use cpu:2")
    try:
        topology = parse_topology(text)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--on ", "--accelerator ")) from None
    return _tpu_pods(topology, text) if topology.chip.platform == "tpu" else _gpu_pods(topology, text)


def _tpu_pods(topology: Topology, text: str) -> Pods:
    if (tpu := _TPUS.get(topology.chip.name)) is None:
        raise ConfigError(f"--accelerator {text}: GKE has no {topology.chip.name}; use one of {', '.join(_TPUS)}")
    chips = math.prod(topology.shape)
    on_host = tpu.single.get(tuple(sorted(topology.shape)) if len(topology.shape) == 2 else topology.shape)
    if on_host is None and (chips <= tpu.per_host or chips % tpu.per_host):
        shapes = ", ".join("x".join(map(str, shape)) for shape in tpu.single)
        raise ConfigError(f"--accelerator {text}: GKE has no such slice; use {shapes} for one host, or more hosts of 4")
    return Pods(
        hosts=1 if on_host else chips // tpu.per_host,
        slices=topology.slices,
        limits={"google.com/tpu": on_host or tpu.per_host},
        selector={
            "cloud.google.com/gke-tpu-accelerator": tpu.name,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, topology.shape)),
        },
        devices=topology.num_devices,
        is_tpu=True,
    )


def _gpu_pods(topology: Topology, text: str) -> Pods:
    if topology.chip.name not in _GPUS:
        raise ConfigError(f"--accelerator {text}: no labels of nodes are known; use one of {', '.join(_GPUS)}")
    hosts, per_host = topology.shape
    of_gke, discovered = _GPUS[topology.chip.name]
    any_of = ({"cloud.google.com/gke-accelerator": of_gke}, {"nvidia.com/gpu.product": discovered})
    return Pods(
        hosts=hosts, limits={"nvidia.com/gpu": per_host}, selector={}, any_of=any_of, devices=topology.num_devices
    )


def name_of(job: Job, number: int | str) -> str:
    """Returns the name of an attempt's workload: pods' names, which are longer, must fit into 63 characters."""
    stem = re.sub("[^a-z0-9]+", "-", job.location.rpartition("/")[2].lower()).strip("-")[:24].strip("-")
    return f"{stem if stem[:1].isalpha() else f'run-{stem}'}-{short_hash(job.location.encode())[:6]}-{number}"


def run_label(job: Job) -> str:
    """Returns the value of `RUN_LABEL`, which begins and ends with a letter or digit."""
    return re.sub("[^A-Za-z0-9_.]", "-", job.id).strip("-_.")


def manifests(job: Job, number: int | str, *, grace_s: int, left_s: float = 0.0) -> list[Manifest]:
    """Returns what the cluster gets for an attempt, without its Secret; the last is to own the others.

    Args:
        job: what to run.
        number: of the attempt, or a word for it.
        grace_s: seconds from SIGTERM to SIGKILL.
        left_s: seconds until the deadline; 0 is none.
    """
    place, pods, name = job.place, pods_of(job.place), name_of(job, number)
    inner = _job_spec(job, number, pods, name, grace_s)
    deadline = {"activeDeadlineSeconds": max(1, round(left_s))} if left_s else {}
    if place.workload == "job":
        if pods.slices > 1:
            raise ConfigError(f"--kind job: a Job is one slice, {place.accelerator} has more; use --kind jobset")
        ended = {"ttlSecondsAfterFinished": _KEPT_S}
        workload = _object("job", "Job", name, job, number, {**inner, **deadline, **ended, **_suspended(place)})
        return [*([_service(name, job, number)] if pods.count > 1 else []), workload]
    replicated = {"name": CONTAINER, "replicas": pods.slices, "template": {"spec": {**inner, **deadline}}}
    spec: Manifest = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {
            "maxRestarts": _RESTARTS,
            "rules": [
                {"name": "needs_a_person", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                {"name": "deadline", "action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]},
            ],
        },
        "replicatedJobs": [replicated],
    }
    if place.workload == "jobset":
        if not pods.is_tpu and pods.count > 1:  # TPUs find each other by what GKE tells them
            spec["coordinator"] = {"replicatedJob": CONTAINER, "jobIndex": 0, "podIndex": 0}
        spec |= {"ttlSecondsAfterFinished": _KEPT_S, **_suspended(place)}
        workload = _object("jobset", "JobSet", name, job, number, spec)
        if pods.is_tpu and pods.count > 1:  # a Job of the set for each slice, with no other on its nodes
            key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
            workload["metadata"]["annotations"] = {key: "cloud.google.com/gke-nodepool"}
        return [workload]
    if pods.slices > 1:
        raise ConfigError(f"--kind trainjob: a TrainJob is one slice, {place.accelerator} has more; use --kind jobset")
    replicated["template"]["metadata"] = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    runtime_spec = {"mlPolicy": {"numNodes": pods.count, "jax": {}}, "template": {"spec": spec}}
    runtime = _object("runtime", "TrainingRuntime", name, job, number, runtime_spec)
    ref = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name}
    train_spec = {"runtimeRef": ref, "trainer": {"numNodes": pods.count}, **_suspended(place)}
    return [runtime, _object("trainjob", "TrainJob", name, job, number, train_spec)]


def _object(kind: str, title: str, name: str, job: Job, number: int | str, spec: Manifest) -> Manifest:
    group, version, _ = WORKLOADS[kind]
    labels, place = _labels(job, number), job.place
    if kind != "runtime" and place.queue:
        labels["kueue.x-k8s.io/queue-name"] = place.queue
        if place.priority:
            labels["kueue.x-k8s.io/priority-class"] = place.priority
    return {"apiVersion": f"{group}/{version}", "kind": title, "metadata": _metadata(name, place, labels), "spec": spec}


def _labels(job: Job, number: int | str) -> dict[str, str]:
    return {RUN_LABEL: run_label(job), ATTEMPT_LABEL: str(number)}


def _suspended(place: PlaceOptions) -> Manifest:
    """Kueue lets a workload run once there is quota."""
    return {"suspend": True} if place.queue else {}


def _service(name: str, job: Job, number: int | str) -> Manifest:
    """Returns the headless Service that gives each pod of a Job the name JOB-INDEX.JOB."""
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # pods look for each other before they are ready
        "selector": {"batch.kubernetes.io/job-name": name},
    }
    metadata = _metadata(name, job.place, _labels(job, number))
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def _metadata(name: str, place: PlaceOptions, labels: dict[str, str]) -> Manifest:
    return {"name": name, **({"namespace": place.namespace} if place.namespace else {}), "labels": labels}


def _job_spec(job: Job, number: int | str, pods: Pods, name: str, grace_s: int) -> Manifest:
    return {
        "completionMode": "Indexed",  # sets JOB_COMPLETION_INDEX
        "completions": pods.hosts,
        "parallelism": pods.hosts,
        "backoffLimit": _RETRIES,
        "podFailurePolicy": {"rules": failure_rules()},
        "podReplacementPolicy": "Failed",  # a pod that still saves must not meet its successor
        "template": {
            "metadata": _pod_metadata(job, number),
            "spec": _pod_spec(job, number, pods, name, grace_s),
        },
    }


def failure_rules() -> list[Manifest]:
    """Returns the rules of a pod that has failed, of which the first that fits counts."""

    def on_codes(action: str, codes: Sequence[int]) -> Manifest:
        values = {"containerName": CONTAINER, "operator": "In", "values": sorted(codes)}
        return {"action": action, "onExitCodes": values}

    final = [code for code, rule in RULES.items() if code and not rule.restarts]
    again = {code for code, rule in RULES.items() if rule.restarts} | {128 + signal for signal in _SIGNALS}
    evicted = [{"type": "DisruptionTarget", "status": "True"}]
    return [
        {"action": "Ignore", "onPodConditions": evicted},
        on_codes("FailJob", final),
        on_codes("Ignore", [*again - {*final}]),
    ]


def _pod_metadata(job: Job, number: int | str) -> Manifest:
    place = job.place
    topology = {"kueue.x-k8s.io/podset-preferred-topology": place.topology} if place.topology else {}
    return {"labels": _labels(job, number), **({"annotations": topology} if topology else {})}


def _pod_spec(job: Job, number: int | str, pods: Pods, name: str, grace_s: int) -> Manifest:
    place = job.place
    selector = {**pods.selector, **dict(word.split("=", 1) for word in place.node_selector)}
    if place.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if place.reservation:
        selector["cloud.google.com/reservation-name"] = place.reservation
    volumes: list[Manifest] = [
        {"name": "scratch", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # libtpu and NCCL need more than 64 MiB
    ]
    mounts: list[Manifest] = [{"name": "scratch", "mountPath": _SCRATCH}, {"name": "shm", "mountPath": "/dev/shm"}]
    for index, word in enumerate(place.volumes):
        claim, _, path = word.partition(":")
        volumes.append({"name": f"claim-{index}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{index}", "mountPath": path})
    container: Manifest = {
        "name": CONTAINER,
        "image": place.image,
        "command": ["python", "-m", "jaxinfra.launchers.places.pod"],
        "args": [*map(_literal, (job.location, str(number), job.bundle, job.folder, *job.command))],
        "env": _environment(job, pods, name),
        "envFrom": [{"secretRef": {"name": name}}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": mounts,
    }
    if pods.limits:
        container["resources"] = {"limits": {key: str(value) for key, value in pods.limits.items()}}
    spec: Manifest = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "automountServiceAccountToken": False,  # nothing here asks the cluster; Workload Identity needs no token
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if place.workload == "job" and pods.count > 1:
        spec["subdomain"] = name
    if place.service_account:
        spec["serviceAccountName"] = place.service_account
    if selector:
        spec["nodeSelector"] = selector
    if pods.any_of:
        terms = [
            {"matchExpressions": [{"key": key, "operator": "In", "values": values} for key, values in each.items()]}
            for each in pods.any_of
        ]
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        spec["affinity"] = {"nodeAffinity": required}
    tainted = [*pods.limits, *(["cloud.google.com/gke-spot"] if place.spot else [])]
    if tainted:  # nodes with chips keep other pods away
        spec["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in tainted]
    return spec


def _literal(word: str) -> str:
    """Returns how a container gets exactly this word, whatever variables it has."""
    return word.replace("$", "$$")


def _environment(job: Job, pods: Pods, name: str) -> list[Manifest]:
    if taken := sorted(_TOLD & job.environment.keys()):
        raise ConfigError(f"--env {taken[0]}: --place k8s says this to the pods; leave it out")
    values = {"HOME": _SCRATCH, **job.environment}
    told: list[Manifest] = [{"name": key, "value": _literal(value)} for key, value in values.items()]
    if pods.is_tpu or pods.count == 1 or job.place.workload == "trainjob":  # GKE and Kubeflow tell it
        return told
    told.append({"name": "JAX_NUM_PROCESSES", "value": str(pods.count)})
    if job.place.workload == "job":
        return [*told, {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-0.{name}:{_PORT}"}]
    labels = {
        "JAX_COORDINATOR_ADDRESS": "coordinator",
        "JOBSET_JOB_INDEX": "job-index",
        "JOBSET_REPLICAS": "replicatedjob-replicas",
    }
    for variable, label in labels.items():
        path = f"metadata.labels['jobset.sigs.k8s.io/{label}']"
        told.append({"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}})
    return told
