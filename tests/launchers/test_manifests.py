"""What a cluster of Kubernetes gets for a run: valid by its schemas, and the pods of it find each other."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from kubeflow_trainer_api import models

from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.manifests import Manifest, failure_rules, manifests, name_of, pods_of
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.restart_policy import RULES
from jaxinfra.processes.discovery import find_processes
from tests.cluster.pods import expanded
from tests.refusals import raises

SCHEMAS = {
    "Service": models.IoK8sApiCoreV1Service,
    "Job": models.IoK8sApiBatchV1Job,
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
JOB = Job(
    location="s3://bucket/runs/Story_2",
    command=["-m", "jaxinfra.cli", "story.py"],
    folder=".",
    bundle="0123",
    environment={"A": "b"},
    place=PlaceOptions(
        kind="k8s",
        accelerator="cpu:2",
        image="registry/story:1",
        namespace="team",
        service_account="trainer",
        volumes=("shared:/shared",),
        node_selector=("pool=training",),
    ),
)
QUEUED = {"queue": "team-queue", "priority": "high", "topology": "cloud.google.com/gke-nodepool", "spot": True}


def paths(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all values of an object."""
    match value:
        case dict():
            for name, each in value.items():
                yield from paths(each, f"{path}.{name}")
        case list():
            for index, each in enumerate(value):
                yield from paths(each, f"{path}[{index}]")
        case _:
            yield path


def pod(template: Mapping[str, Any], labels: Mapping[str, str], job: str, index: int) -> dict[str, str]:
    """The environment of a pod of an indexed Job."""
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": f"{job}-{index}"}
    environment["JOB_COMPLETION_INDEX"] = str(index)
    for variable in template["template"]["spec"]["containers"][0].get("env", []):
        value = variable.get("value")
        if value is None:
            match = re.fullmatch(r"metadata\.labels\['(.*)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"])
            assert match
            value = labels[match[1]]
        environment[variable["name"]] = value
    return environment


def made(kind: str = "jobset", accelerator: str = "cpu:2", **more: Any) -> list[Manifest]:
    place = replace(JOB.place, workload=kind, accelerator=accelerator, **more)
    return manifests(replace(JOB, place=place), 3, grace_s=120, left_s=600.0)


def job_spec(kind: str, accelerator: str) -> Manifest:
    """The spec of the Job in what is made."""
    every = made(kind, accelerator)
    first, last = every[0], every[-1]
    if kind == "job":
        return last["spec"]
    spec = first["spec"]["template"]["spec"] if kind == "trainjob" else last["spec"]
    return spec["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("more", [{}, QUEUED])
@pytest.mark.parametrize("accelerator", ["cpu:2", "v6e:2x4", "v5p:4x4x4", "h100:2x8"])
@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_fields_are_those_of_the_schema(kind: str, accelerator: str, more: dict[str, Any]) -> None:
    for manifest in made(kind, accelerator, **more):
        parsed = SCHEMAS[manifest["kind"]].from_json(json.dumps(manifest))
        assert parsed is not None
        given = {path for path in paths(manifest) if "mlPolicy.jax" not in path}
        assert given <= {*paths(parsed.to_dict())}, "a field that the schema does not have, or in the wrong place"


@pytest.mark.parametrize(
    ("accelerator", "hosts", "slices", "limits", "topology"),
    [
        ("cpu", 1, 1, {}, None),
        ("v5e:1x1", 1, 1, {"google.com/tpu": 1}, "1x1"),
        ("v6e:2x4", 1, 1, {"google.com/tpu": 8}, "2x4"),
        ("v6e:4x4", 4, 1, {"google.com/tpu": 4}, "4x4"),
        ("2xv5p:2x2x4", 4, 2, {"google.com/tpu": 4}, "2x2x4"),
        ("v5p:2x2x1", 1, 1, {"google.com/tpu": 4}, "2x2x1"),
        ("h100:4x8", 4, 1, {"nvidia.com/gpu": 8}, None),
    ],
)
def test_chips_become_pods(
    accelerator: str, hosts: int, slices: int, limits: dict[str, int], topology: str | None
) -> None:
    pods = pods_of(replace(JOB.place, accelerator=accelerator))
    assert (pods.hosts, pods.slices, pods.limits) == (hosts, slices, limits)
    assert pods.selector.get("cloud.google.com/gke-tpu-topology") == topology


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_pods_need_no_rights(kind: str) -> None:
    """What the pod security standard "restricted" asks of a pod."""
    spec = job_spec(kind, "v6e:4x4")["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]["type"] != "Unconfined"
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert {(*volume,)[1] for volume in spec["volumes"]} <= {"emptyDir", "persistentVolumeClaim"}


@pytest.mark.parametrize(
    ("kind", "accelerator", "slices", "hosts"),
    [("job", "cpu:2", 1, 2), ("jobset", "cpu:2", 1, 2), ("jobset", "2xv5p:2x2x4", 2, 4)],
)
def test_pods_find_each_other(kind: str, accelerator: str, slices: int, hosts: int) -> None:
    name, spec = made(kind, accelerator)[-1]["metadata"]["name"], job_spec(kind, accelerator)
    stem = name if kind == "job" else f"{name}-node"
    every = [[f"{stem}-{f'{job}-' * (kind != 'job')}{each}.{name}" for each in range(hosts)] for job in range(slices)]
    for job in range(slices):
        labels = {
            "jobset.sigs.k8s.io/job-index": str(job),
            "jobset.sigs.k8s.io/replicatedjob-replicas": str(slices),
            "jobset.sigs.k8s.io/coordinator": every[0][0],
        }
        for index in range(hosts):
            environment = pod(spec, labels, every[job][0].partition(".")[0].removesuffix("-0"), index)
            if "google.com/tpu" in str(spec):  # by GKE
                environment |= {"TPU_WORKER_HOSTNAMES": ",".join(every[job]), "TPU_WORKER_ID": str(index)}
                environment |= {"MEGASCALE_NUM_SLICES": str(slices), "MEGASCALE_SLICE_ID": str(job)}
                environment["MEGASCALE_COORDINATOR_ADDRESS"] = every[0][0]
            processes = find_processes(environment)
            assert processes is not None
            assert (processes.index, processes.count) == (job * hosts + index, slices * hosts)
            assert processes.coordinator.rpartition(":")[0] == every[0][0]
    assert ("subdomain" in spec["template"]["spec"]) == (kind == "job"), "a JobSet has a Service of its own"


def test_every_exit_code_has_one_rule() -> None:
    evicted, final, again = failure_rules()
    assert evicted == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert [each["action"] for each in (final, again)] == ["FailJob", "Ignore"]
    fails, restarts = ({*each["onExitCodes"]["values"]} for each in (final, again))
    assert fails == {code for code, rule in RULES.items() if code and not rule.restarts}
    assert fails == {1, 2, 78, 79, 80, 81, 83, 84, 130}
    assert {75, 76, 77, 82, 134, 137, 143} <= restarts and not fails & restarts
    assert all(
        len(each["onExitCodes"]["values"]) <= 255 and 0 not in each["onExitCodes"]["values"] for each in (final, again)
    )


def test_names_fit_into_those_of_pods() -> None:
    for location in ("gs://b/runs/9_Nine", f"gs://b/runs/{'long-name-' * 20}", "gs://b/runs/Ünïcode"):
        name = name_of(replace(JOB, location=location), 123)
        assert name[0].isalpha() and name.isascii() and name.islower()
        assert len(f"{name}-node-99-999-abcde") <= 63
    assert name_of(JOB, 1) != name_of(replace(JOB, location="s3://other/runs/Story_2"), 1)


@pytest.mark.parametrize(
    ("kind", "accelerator", "named"),
    [
        ("jobset", "v9:2x2", "--accelerator v9:2x2 v5p"),
        ("jobset", "v6e:2x3", "--accelerator v6e:2x3 2x4"),
        ("job", "2xv5e:4x4", "--kind jobset 2xv5e:4x4"),
        ("trainjob", "2xv5e:4x4", "--kind jobset 2xv5e:4x4"),
        ("job", "cpu:two", "--accelerator cpu:two cpu:2"),
    ],
)
def test_what_kubernetes_cannot_run_is_refused(kind: str, accelerator: str, named: str) -> None:
    with raises(ConfigError, named):
        made(kind, accelerator)


def test_what_the_pods_are_told_is_not_set_otherwise() -> None:
    with raises(ConfigError, "--env JAX_NUM_PROCESSES --place k8s"):
        manifests(replace(JOB, environment={"JAX_NUM_PROCESSES": "3"}), "1", grace_s=60)


def test_a_dollar_sign_is_itself() -> None:
    """A pod that expands variables as the kubelet does gets what the user has written."""
    job = replace(JOB, location="gs://b/runs/a$(HOME)", environment={"A": "$$(HOME) $"})
    made = manifests(replace(job, place=replace(JOB.place, workload="job")), 3, grace_s=60)[-1]
    (container,) = made["spec"]["template"]["spec"]["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert expanded(container["args"][0], {"HOME": "/scratch"}) == job.location
    assert expanded(given["A"], {"HOME": "/scratch"}) == job.environment["A"]


@pytest.mark.parametrize("name", ["Ünï", "-a_b.", "Story 2", "日本"])
def test_labels_are_those_of_kubernetes(name: str) -> None:
    place = replace(JOB.place, workload="job")
    for each in manifests(replace(JOB, location=f"s3://bucket/runs/{name}", place=place), 3, grace_s=60):
        for label in each["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", label)
        assert re.fullmatch("[a-z]([a-z0-9-]{0,61}[a-z0-9])?", each["metadata"]["name"])
