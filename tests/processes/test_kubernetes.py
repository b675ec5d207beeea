"""The manifests of docs/kubernetes fit the schemas, and their pods find each other."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from jaxinfra.launchers.restart_policy import RULES
from jaxinfra.processes.discovery import find_processes
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "kubernetes"
SCHEMAS = {
    "Service": models.IoK8sApiCoreV1Service,
    "Job": models.IoK8sApiBatchV1Job,
    "JobSet": models.JobsetV1alpha2JobSet,
    "TrainJob": models.TrainerV1alpha1TrainJob,
}
FILES = ("job.yaml", "jobset.yaml", "jobset-tpu.yaml", "trainjob.yaml")


def manifests(name: str) -> dict[str, Any]:
    """The objects of a file by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / name).read_text())}


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


def test_every_file_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {*FILES}


@pytest.mark.parametrize("name", FILES)
def test_fields_are_those_of_the_schema(name: str) -> None:
    for kind, manifest in manifests(name).items():
        parsed = SCHEMAS[kind].from_json(json.dumps(manifest))
        assert parsed is not None
        known = parsed.to_dict()
        assert {*paths(manifest)} == {*paths(known)}, "a field that the schema does not have, or in the wrong place"


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


def test_pods_of_a_job_find_each_other() -> None:
    found = manifests("job.yaml")
    job, service = found["Job"], found["Service"]
    name, spec = job["metadata"]["name"], job["spec"]
    subdomain = spec["template"]["spec"]["subdomain"]
    assert (service["metadata"]["name"], service["spec"]["clusterIP"]) == (subdomain, "None")
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    for index in range(spec["completions"]):
        processes = find_processes(pod(spec, {}, name, index))
        assert processes is not None
        assert (processes.index, processes.count) == (index, spec["completions"])
        assert processes.coordinator == f"{name}-0.{subdomain}:8476"
        assert processes.hosts == tuple(f"{name}-{each}.{subdomain}" for each in range(spec["completions"]))


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-tpu.yaml"])
def test_pods_of_a_jobset_find_each_other(name: str) -> None:
    jobset = manifests(name)["JobSet"]
    run = jobset["metadata"]["name"]
    (workers,) = jobset["spec"]["replicatedJobs"]
    spec, jobs = workers["template"]["spec"], workers["replicas"]
    pods = spec["completions"]
    assert spec["parallelism"] == pods
    hosts = [[f"{run}-{workers['name']}-{job}-{index}.{run}" for index in range(pods)] for job in range(jobs)]
    for job in range(jobs):
        labels = {
            "jobset.sigs.k8s.io/job-index": str(job),
            "jobset.sigs.k8s.io/replicatedjob-replicas": str(jobs),
        }
        if "coordinator" in jobset["spec"]:
            labels["jobset.sigs.k8s.io/coordinator"] = hosts[0][0]
        for index in range(pods):
            environment = pod(spec, labels, f"{run}-{workers['name']}-{job}", index)
            if "google.com/tpu" in str(spec):  # by GKE
                environment |= {"TPU_WORKER_HOSTNAMES": ",".join(hosts[job]), "TPU_WORKER_ID": str(index)}
                environment |= {"MEGASCALE_NUM_SLICES": str(jobs), "MEGASCALE_SLICE_ID": str(job)}
                environment["MEGASCALE_COORDINATOR_ADDRESS"] = hosts[0][0]
            processes = find_processes(environment)
            assert processes is not None
            assert (processes.index, processes.count) == (job * pods + index, jobs * pods)
            assert processes.coordinator.rpartition(":")[0] == hosts[0][0]


@pytest.mark.parametrize("name", ["job.yaml", "jobset.yaml", "jobset-tpu.yaml"])
def test_codes_that_need_a_person_start_nothing_again(name: str) -> None:
    """The run starts again after 75 to 77, when the bucket is back (82), and when its other owner has ended (84)."""
    found = manifests(name)
    job = found["Job"] if "Job" in found else found["JobSet"]["spec"]["replicatedJobs"][0]["template"]
    rules = job["spec"]["podFailurePolicy"]["rules"]
    (fatal,) = (rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {*fatal["values"]} == {code for code, rule in RULES.items() if not rule.restarts} - {0, 1, 84, 130}
    assert all(rule["onExitCodes"]["containerName"] == container["name"] for rule in rules if "onExitCodes" in rule)
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never", "needed by podFailurePolicy"
