"""Whether the cluster of tests refuses what a real one does, and its Jobs and queues live as real ones do."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException

from tests.cloud.hosts import Hosts
from tests.cluster.pod_security import ENFORCE
from tests.cluster.server import QUEUE, Cluster

Json = dict[str, Any]
_JOBSETS: Any = ("jobset.x-k8s.io", "v1alpha2", "default", "jobsets")
_TPU = {"cloud.google.com/gke-tpu-topology": "2x4"}
_FAIL_JOB = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [81]}}
_IGNORE = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}


def _job(script: str = "true", *, name: str = "a", count: int = 1, pod: Json | None = None, **spec: Any) -> Json:
    container = {"name": "main", "image": "train:1", "command": ["sh", "-c", script],
                 "resources": {"limits": {"google.com/tpu": "4"}}}  # fmt: skip
    template = {"spec": {"restartPolicy": "Never", "containers": [container], "nodeSelector": _TPU, **(pod or {})}}
    limits = {"completionMode": "Indexed", "completions": count, "parallelism": count, "backoffLimit": 0}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
    return body | {"spec": {**limits, "template": template, **spec}}


def _job_set(*jobs: Json, name: str = "s", after: str = "", **spec: Any) -> Json:
    replicated: list[Json] = [{"name": job["metadata"]["name"], "template": {"spec": job["spec"]}} for job in jobs]
    if after:
        replicated[-1]["dependsOn"] = [{"name": after, "status": "Complete"}]
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": name},
            "spec": {"replicatedJobs": replicated, **spec}}  # fmt: skip


def _policy(*rules: Json) -> Json:
    return {"podFailurePolicy": {"rules": [*rules]}}


def _codes(*values: int, **more: Any) -> Json:
    return _policy({"action": "FailJob", "onExitCodes": {"operator": "In", "values": [*values], **more}})


class Api:
    """The official client, of a cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.client = config.new_client_from_config(str(cluster.kubeconfig(folder / "kubeconfig")))
        self.core: Any = client.CoreV1Api(self.client)  # Any: each call may answer in several ways
        self.batch: Any = client.BatchV1Api(self.client)
        self.custom: Any = client.CustomObjectsApi(self.client)

    def close(self) -> None:
        self.client.rest_client.pool_manager.clear()

    def submit(self, body: Json, namespace: str = "default") -> Any:
        if body["kind"] == "Job":
            return self.batch.create_namespaced_job(namespace, body, field_validation="Strict")
        return self.custom.create_namespaced_custom_object(
            *_JOBSETS[:2], namespace, "jobsets", body, field_validation="Strict"
        )

    def job(self, name: str = "a") -> Any:
        return self.batch.read_namespaced_job(name, "default")

    def ended(self, name: str = "a") -> tuple[str, str, str]:
        """The condition with which a Job ends, its reason and its message."""
        done = until(lambda: [c for c in self.job(name).status.conditions or [] if c.type in ("Complete", "Failed")])
        return done[0].type, done[0].reason, done[0].message

    def pods(self, selector: str = "job-name=a") -> list[Any]:
        return self.core.list_namespaced_pod("default", label_selector=selector).items

    def running(self, selector: str = "job-name=a") -> Any:
        return until(lambda: [pod for pod in self.pods(selector) if pod.status.phase == "Running"])[0].metadata.name

    def waiting(self) -> Any:
        statuses = until(
            lambda: [pod.status.container_statuses for pod in self.pods() if pod.status.container_statuses]
        )
        return statuses[0][0].state.waiting

    def events(self, reason: str) -> list[str]:
        return [event.message for event in self.core.list_namespaced_event("default").items if event.reason == reason]

    def log(self, pod: str) -> str:
        # Not decoded by the client, which would give the text of a bytes object.
        return self.core.read_namespaced_pod_log(pod, "default", _preload_content=False).data.decode()

    def job_set(self) -> Json:
        return self.custom.get_namespaced_custom_object(*_JOBSETS, "s")


def until[T](met: Callable[[], T]) -> T:
    deadline = time.monotonic() + 60
    while not (found := met()):
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def api(hosts: Hosts, tmp_path: Path) -> Iterator[Api]:
    with Cluster(hosts) as cluster:
        cluster.images["train:1"] = []
        for name in ("tpu-0", "tpu-1"):
            cluster.add_node(name, labels=_TPU, capacity={"google.com/tpu": 4},
                             taints=[{"key": "spot", "effect": "NoSchedule"}] if name == "tpu-1" else [])  # fmt: skip
        with closing(Api(cluster, tmp_path)) as api:
            yield api


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with Cluster() as cluster:
        cluster.add_namespace("restricted", {ENFORCE: "restricted"})
        with closing(Api(cluster, tmp_path_factory.mktemp("paper"))) as api:
            yield api


_LONG = "n" * 60
_REFUSED = {
    "unknown field": (_job(parallelismm=1), 400, 'strict decoding error: unknown field "spec.parallelismm"'),
    "wrong type": (_job(backoffLimit="3"), 400, "cannot unmarshal string"),
    "boolean for a number": (_job(backoffLimit=True), 400, "cannot unmarshal boolean"),
    "no template": (_job(template=None), 422, "spec.template: Required value"),
    "no name of a container": (_job(pod={"containers": [{"image": "x"}]}), 422, "containers[0].name: Required value"),
    "restart policy": (_job(pod={"restartPolicy": "Always"}), 422, 'valid values: "OnFailure", "Never"'),
    "no completions": (_job(completions=None), 422, "when completion mode is Indexed"),
    "long name": (_job(name="n" * 62), 422, "invalid DNS label"),
    "upper case": (_job(name="A"), 422, 'Job.batch "A" is invalid: metadata.name'),
    "exit code 0": (_job(**_codes(0)), 422, "must not be 0 for the In operator"),
    "same exit codes": (_job(**_codes(3, 3)), 422, "must be ordered and without duplicates"),
    "256 exit codes": (_job(**_codes(*range(1, 257))), 422, "must have 1 to 255 items"),
    "21 rules": (_job(**_policy(*[_FAIL_JOB] * 21)), 422, "must have at most 20 items"),
    "no such container": (_job(**_codes(1, containerName="x")), 422, "must be one of the container"),
    "policy that restarts": (_job(pod={"restartPolicy": "OnFailure"}, **_codes(1)), 422, 'only "Never" is supported'),
    "no volume": (_job(pod={"containers": [{"name": "m", "image": "x", "volumeMounts": [
        {"name": "v", "mountPath": "/v"}]}]}), 422, "volumeMounts[].name: Not found"),
    "label": (_job() | {"metadata": {"name": "b", "labels": {"run": "x" * 64}}}, 422, "must be no more than 63 bytes"),
    "quantity": (_job(pod={"containers": [{"name": "m", "image": "x", "resources": {"limits": {"cpu": "two"}}}]}), 400,
                 "quantities must match"),
    "devices overcommitted": (_job(pod={"containers": [{"name": "m", "image": "x", "resources": {
        "requests": {"google.com/tpu": "4"}}}]}), 422, "Limit must be set for non overcommitable resources"),
    "set: unknown field": (_job_set(_job(), retries=1), 400, 'unknown field "spec.retries"'),
    "set: wrong type": (_job_set(_job(), suspend="yes"), 422, "spec.suspend in body must be of type boolean"),
    "set: long name": (_job_set(_job(), name=_LONG), 403, "pod names generated for this JobSet will exceed 63"),
    "set: reason": (_job_set(_job(), failurePolicy={"rules": [
        {"action": "FailJobSet", "onJobFailureReasons": ["Lost"]}]}), 403, "not a recognized job failure reason"),
    "set: action": (_job_set(_job(), failurePolicy={"rules": [{"action": "Retry"}]}), 422, "Unsupported value"),
    "set: same names": (_job_set(_job(), _job()), 422, "Duplicate value"),
    "set: two orders": (
        _job_set(_job(), _job(name="b"), after="a", startupPolicy={"startupPolicyOrder": "InOrder"}), 422,
        "StartupPolicy and DependsOn APIs are mutually exclusive"),
}  # fmt: skip


@pytest.mark.parametrize("case", [*_REFUSED])
def test_what_breaks_a_rule_is_refused(paper: Api, case: str) -> None:
    body, code, message = _REFUSED[case]
    with pytest.raises(ApiException) as refused:
        paper.submit(body)
    assert refused.value.status == code and message in _status(refused.value)["message"]
    assert not paper.batch.list_namespaced_job("default").items


def _status(error: Any) -> Json:
    return json.loads(error.body)


def test_names_and_rights_are_checked(paper: Api) -> None:
    paper.core.create_namespaced_secret("default", {"metadata": {"name": "key"}, "stringData": {"a": "b"}})
    assert paper.core.read_namespaced_secret("key", "default").data == {"a": "Yg=="}
    refusals: list[tuple[Callable[[], Any], int, str, str]] = [
        (lambda: paper.core.create_namespaced_secret("default", {"metadata": {"name": "key"}}), 409, "AlreadyExists",
         'secrets "key" already exists'),
        (lambda: paper.job("none"), 404, "NotFound", 'jobs.batch "none" not found'),
        (lambda: paper.submit(_job(), "nowhere"), 404, "NotFound", 'namespaces "nowhere" not found'),
        (lambda: paper.core.list_namespaced_pod("default"), 403, "Forbidden", 'pods is forbidden: User "ada" cannot '
         'list resource "pods" in API group "" in the namespace "default"'),
    ]  # fmt: skip
    paper.cluster.denied = {"list pods"}
    for call, code, reason, message in refusals:
        with pytest.raises(ApiException) as refused:
            call()
        status = _status(refused.value)
        assert (refused.value.status, status["reason"], status["message"]) == (code, reason, message)
    paper.cluster.denied.clear()
    assert paper.core.list_namespaced_pod("default").items == []


def test_restricted_pods_are_refused_but_not_their_job(paper: Api) -> None:
    _, _, headers = paper.batch.create_namespaced_job_with_http_info("restricted", _job())
    assert 'would violate PodSecurity \\"restricted:latest\\": allowPriv' in headers["Warning"]
    events = until(lambda: paper.core.list_namespaced_event("restricted", field_selector="involvedObject.name=a").items)
    assert events[0].reason == "FailedCreate" and "must set securityContext.runAsNonRoot=true" in events[0].message
    assert not paper.core.list_namespaced_pod("restricted").items


def test_suspended_by_a_queue(api: Api) -> None:
    api.submit(_job() | {"metadata": {"name": "a", "labels": {QUEUE: "none"}}})
    kueue: Any = ("kueue.x-k8s.io", "v1beta1", "default", "workloads")
    found = until(lambda: api.custom.list_namespaced_custom_object(*kueue)["items"])
    condition = until(lambda: api.custom.list_namespaced_custom_object(*kueue)["items"][0].get("status"))["conditions"][
        0
    ]
    assert (condition["type"], condition["status"]) == ("QuotaReserved", "False") and len(found) == 1
    assert condition["message"] == "LocalQueue none doesn't exist" and api.job().spec.suspend and not api.pods()
    api.cluster.add_queue("none", quota={"google.com/tpu": 4})
    assert api.ended()[0] == "Complete"


def test_a_queue_takes_back_what_it_has_admitted(api: Api) -> None:
    api.cluster.add_queue("small", quota={"google.com/tpu": 2})
    job = _job("sleep 60", pod={"terminationGracePeriodSeconds": 0})
    api.submit(_job_set(job) | {"metadata": {"name": "s", "labels": {QUEUE: "small"}}})
    kueue: Any = ("kueue.x-k8s.io", "v1beta2", "default", "workloads")
    wait = "insufficient unused quota for google.com/tpu in flavor default-flavor, 2 more needed"
    until(lambda: wait in json.dumps(api.custom.list_namespaced_custom_object(*kueue)))
    api.cluster.admit("s")
    api.running("")
    api.cluster.requeue("s")
    until(lambda: api.job_set()["spec"]["suspend"] and not api.pods(""))


def test_a_quota_refuses_pods_but_not_their_job(api: Api) -> None:
    api.cluster.add("ResourceQuota", "chips", "default", spec={"hard": {"requests.google.com/tpu": "4"}})
    tolerates = {"tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 0}
    api.submit(_job("sleep 60", count=2, pod=tolerates))
    message = until(lambda: api.events("FailedCreate"))[0]
    amounts = ("requested: {0}=4, used: {0}=4, limited: {0}=4").format("requests.google.com/tpu")
    assert message.endswith(f"is forbidden: exceeded quota: chips, {amounts}") and len(api.pods()) == 1
    asked = {"spec": {"resourceAttributes": {"verb": "create", "resource": "jobs", "group": "batch"}}}
    review: Any = client.AuthorizationV1Api(api.client)
    assert review.create_self_subject_access_review(asked).status.allowed
    api.cluster.denied = {"* jobs.batch"}
    assert not review.create_self_subject_access_review(asked).status.allowed


_LIMIT = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
_RULE = "Container main for pod default/{} failed with exit code 81 matching FailJob rule at index 0"


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (0, ("Complete", "CompletionsReached", "Reached expected number of succeeded pods")),
        (75, _LIMIT),
        (81, ("Failed", "PodFailurePolicy", _RULE)),
        (137, _LIMIT),
    ],
)
def test_exit_codes_end_a_job(api: Api, code: int, end: tuple[str, str, str]) -> None:
    api.submit(_job(f"exit {code}", **_policy(_FAIL_JOB, _IGNORE)))
    found, pod = api.ended(), api.pods()[0]
    assert found == (*end[:2], end[2].format(pod.metadata.name))
    assert pod.status.container_statuses[0].state.terminated.exit_code == code


def test_an_evicted_pod_is_replaced(api: Api) -> None:
    script = "trap 'echo bye; exit 75' TERM; echo at $JOB_COMPLETION_INDEX $NODE; sleep 60 & wait"
    job = _job(script, **_policy(_FAIL_JOB, _IGNORE))
    job["spec"]["template"]["spec"]["containers"][0]["env"] = [
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    ]
    api.submit(job)
    first = api.running()
    with closing(api.core.read_namespaced_pod_log(first, "default", follow=True, _preload_content=False)) as stream:
        assert stream.readline() == b"at 0 tpu-0\n"
        api.core.create_namespaced_pod_eviction(first, "default", {"metadata": {"name": first}})
        assert stream.readline() == b"bye\n" and stream.readline() == b""
    until(lambda: (name := api.running()) and name != first)
    assert not api.job().status.failed and api.job().status.active == 1
    api.core.delete_namespaced_pod(api.running(), "default", grace_period_seconds=0)  # by a user: that is a failure
    assert api.ended() == _LIMIT


def test_a_pod_that_does_not_heed_sigterm_is_killed(api: Api) -> None:
    api.submit(_job("sleep 60", pod={"terminationGracePeriodSeconds": 1}, **_policy(_IGNORE)))  # sh is process 1
    first = api.running()
    versions = api.core.list_namespaced_pod("default").metadata.resource_version
    api.cluster.preempt_node("tpu-0", after_s=9)
    found: Any = watch.Watch().stream(
        api.core.list_namespaced_pod, "default", resource_version=versions, timeout_seconds=30
    )
    with closing(found):
        pod = next(event["object"] for event in found if event["object"].status.phase == "Failed")
    assert pod.status.container_statuses[0].state.terminated.exit_code == 137 and pod.metadata.name == first
    assert "TerminationByKubelet" in {condition.reason for condition in pod.status.conditions}


def test_a_suspended_job_has_no_pods(api: Api) -> None:
    api.submit(_job("sleep 60", pod={"terminationGracePeriodSeconds": 0}))
    api.running()
    api.batch.patch_namespaced_job("a", "default", {"spec": {"suspend": True}})
    until(lambda: not api.pods())
    conditions = until(lambda: api.job().status.conditions)
    assert (conditions[0].type, conditions[0].reason, api.job().status.failed) == ("Suspended", "JobSuspended", None)
    with pytest.raises(ApiException, match="field is immutable"):
        api.batch.patch_namespaced_job("a", "default", {"spec": {"completions": 2}})
    api.batch.patch_namespaced_job("a", "default", {"spec": {"suspend": False}})
    api.running()
    api.batch.delete_namespaced_job("a", "default", propagation_policy="Foreground")
    until(lambda: not api.pods() and not api.batch.list_namespaced_job("default").items)


def test_secrets_and_volumes_reach_a_pod(api: Api) -> None:
    pod: Json = {
        "volumes": [{"name": "scratch", "emptyDir": {}}, {"name": "key", "secret": {"secretName": "key"}}],
        "containers": [{
            "name": "main", "image": "train:1", "command": ["sh", "-c"], "envFrom": [{"secretRef": {"name": "key"}}],
            "args": ["test -s $(ACCOUNT)/token && cat $(DIR)/a; echo $a > /scratch/b && cat /scratch/b; exit 3"],
            "env": [{"name": "DIR", "value": "/key"},
                    {"name": "ACCOUNT", "value": "/run/secrets/kubernetes.io/serviceaccount"}],
            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}, {"name": "key", "mountPath": "/key"}],
        }],
    }  # fmt: skip
    api.submit(_job(pod=pod))
    waiting = api.waiting()
    assert waiting.reason == "CreateContainerConfigError" and waiting.message == 'secret "key" not found'
    api.core.create_namespaced_secret("default", {"metadata": {"name": "key"}, "stringData": {"a": "secret\n"}})
    assert api.ended() == _LIMIT and api.log(api.pods()[0].metadata.name) == "secret\nsecret\n"
    assert (
        not Path("/run/secrets/kubernetes.io").exists() and not Path("/scratch").exists() and not Path("/key").exists()
    )


def test_a_lost_node_is_no_failure(api: Api) -> None:
    api.submit(_job("sleep 60", **_policy(_IGNORE)))
    first = api.running()
    api.cluster.lose_node("tpu-0")
    message = until(lambda: api.events("FailedScheduling"))[0]
    assert message.startswith("0/1 nodes are available: 1 node(s) had untolerated taint {spot: }. preemption: 0/1")
    assert [pod.metadata.name for pod in api.pods()] != [first] and not api.job().status.failed
    api.batch.delete_namespaced_job("a", "default")  # which leaves its pods
    assert api.pods() and not api.pods()[0].metadata.owner_references


def test_an_image_that_nobody_has(api: Api) -> None:
    job = _job()
    job["spec"]["template"]["spec"]["containers"][0]["image"] = "train:2"
    api.submit(job)
    waiting = api.waiting()
    assert waiting.reason == "ImagePullBackOff" and "train:2" in waiting.message


@pytest.mark.parametrize(
    ("script", "restarts", "reason"),
    [
        ("exit 81", 0, "FailJobSetFailurePolicyAction"),
        ("exit 75", 2, "ReachedMaxRestarts"),
        ("test $ATTEMPT = 1", 1, "AllJobsCompleted"),
    ],
)
def test_job_sets_restart_and_fail(api: Api, script: str, restarts: int, reason: str) -> None:
    job = _job(script, **_policy(_FAIL_JOB))
    field = "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
    job["spec"]["template"]["spec"]["containers"][0]["env"] = [
        {"name": "ATTEMPT", "valueFrom": {"fieldRef": {"fieldPath": field}}}
    ]
    rules = [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    api.submit(_job_set(job, failurePolicy={"maxRestarts": 2, "rules": rules}))
    status = until(lambda: (s := api.job_set().get("status", {})).get("terminalState") and s)
    assert status["restarts"] == restarts and status["conditions"][-1]["reason"] == reason


def test_pods_know_each_other_by_name(api: Api) -> None:
    tolerates = {"tolerations": [{"key": "spot", "operator": "Exists"}]}
    listen = "import socket; s = socket.create_server(('', 9)); print(s.accept()[0].recv(9))"
    ask = "until python -c \"import socket; socket.create_connection(('s-a-0-0.s', 9)).send(b'hello')\" 2>/dev/null; "
    script = f'if [ $JOB_COMPLETION_INDEX = 0 ]; then python -c "{listen}"; else {ask} do sleep 0.1; done; fi'
    api.submit(_job_set(_job(script, count=2, pod=tolerates)))
    until(lambda: api.job_set().get("status", {}).get("terminalState") == "Completed")
    pod = api.pods("batch.kubernetes.io/job-completion-index=0")[0].metadata.name
    assert api.log(pod) == "b'hello'\n"


def test_a_train_job_runs_by_its_runtime(api: Api) -> None:
    job = _job()["spec"]
    job["template"]["spec"]["containers"][0] = {"name": "node", "image": "other:1"}
    runtime = {"metadata": {}, "spec": {"replicatedJobs": [{"name": "node", "template": {"spec": job}}]}}
    trainer = {"image": "train:1", "command": ["sh", "-c", "echo $JAX_COORDINATOR_ADDRESS"], "numNodes": 1}
    body = {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "metadata": {"name": "s"},
            "spec": {"runtimeRef": {"name": "jax"}, "trainer": trainer}}  # fmt: skip
    kind: Any = ("trainer.kubeflow.org", "v1alpha1", "default", "trainjobs")
    with pytest.raises(ApiException, match="must be created before the TrainJob is created"):
        api.custom.create_namespaced_custom_object(*kind, body, field_validation="Strict")
    api.cluster.add("ClusterTrainingRuntime", "jax", spec={"mlPolicy": {"numNodes": 2, "jax": {}}, "template": runtime})
    api.custom.create_namespaced_custom_object(*kind, body, field_validation="Strict")
    status = until(lambda: (s := api.custom.get_namespaced_custom_object(*kind, "s").get("status")) and s)
    until(lambda: "Complete" in json.dumps(api.custom.get_namespaced_custom_object(*kind, "s")["status"]))
    pod = api.pods("jobset.sigs.k8s.io/jobset-name=s")[0].metadata.name
    assert status and api.log(pod) == "s-node-0-0.s:6666\n"


def test_operators_may_be_missing(tmp_path: Path) -> None:
    with Cluster(installed=()) as cluster, closing(Api(cluster, tmp_path)) as api:
        apis: Any = client.ApisApi(api.client)
        groups = {group.name for group in apis.get_api_versions().groups}
        assert groups == {"batch", "scheduling.k8s.io"}
        with pytest.raises(ApiException, match="404 page not found"):
            api.submit(_job_set(_job()))
