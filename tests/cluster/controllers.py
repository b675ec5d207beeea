"""Controllers of Jobs, JobSets and TrainJobs, and the garbage collector.

Each looks at all its objects and moves them on by a step; `reconcile` is called until nothing changes any more. The
reasons and messages are those of the real controllers, since programs and users read them.
"""

import hashlib
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from tests.cluster.objects import age_s, child, create, event, holds, now, set_condition, suffix
from tests.cluster.queues import queue
from tests.cluster.scheduler import schedule
from tests.cluster.schemas import BY_NAME, Json

if TYPE_CHECKING:
    from tests.cluster.server import Cluster

_TRACKING = "batch.kubernetes.io/job-tracking"
_INDEX = "batch.kubernetes.io/job-completion-index"
_SET = "jobset.sigs.k8s.io/"


def reconcile(cluster: "Cluster") -> None:
    """Moves everything on by a step; the lock is held."""
    collect(cluster)
    if cluster.has_queues:
        for plural in ("jobs", "jobsets", "trainjobs"):
            for body in cluster.find(plural):
                queue(cluster, body)
    for plural, step in (("trainjobs", _train_job), ("jobsets", _job_set), ("jobs", _job)):
        for body in cluster.find(plural):
            if "deletionTimestamp" not in body["metadata"]:
                step(cluster, body)
    schedule(cluster)
    cluster.kubelet.sync(cluster)


def collect(cluster: "Cluster") -> None:
    """Removes what is deleted and held by nothing, and deletes what has lost its owner."""
    uids = {each["metadata"]["uid"] for each in cluster.objects.values()}
    for key, body in [*cluster.objects.items()]:
        meta = body["metadata"]
        owners = [of["uid"] for of in meta.get("ownerReferences", ())]
        deleted = "deletionTimestamp" in meta
        if owners and not uids.intersection(owners):
            meta.pop("finalizers", None)  # of an owner that counts no more
            if not deleted:
                cluster.delete(body)
        if deleted and "foregroundDeletion" in meta.get("finalizers", ()):
            dependents = cluster.find_dependents(body)
            for each in dependents:
                each["metadata"].pop("finalizers", None) if each["kind"] == "Pod" else None
                if "deletionTimestamp" not in each["metadata"]:
                    cluster.delete(each, "Foreground" if each["kind"] == "Job" else "Background")
            if not dependents:
                meta["finalizers"].remove("foregroundDeletion")
        if deleted and not meta.get("finalizers") and not cluster.kubelet.runs(body):
            cluster.objects.pop(key, None)


def _train_job(cluster: "Cluster", body: Json) -> None:
    """Makes the JobSet of a TrainJob by its runtime, and says how it does."""
    meta, spec = body["metadata"], body["spec"]
    key = ("jobsets", meta["namespace"], meta["name"])
    found = cluster.objects.get(key)
    if found is None and not holds(body, "Complete", "Failed"):
        ref = BY_NAME[spec["runtimeRef"]["kind"]]
        runtime = cluster.objects[(ref.plural, meta["namespace"] if ref.namespaced else "", spec["runtimeRef"]["name"])]
        template, policy = deepcopy(runtime["spec"]["template"]), runtime["spec"].get("mlPolicy", {})
        trainer = spec.get("trainer", {})
        nodes = trainer.get("numNodes", policy.get("numNodes", 1))
        container = {key: trainer[key] for key in ("image", "command", "args", "env") if key in trainer}
        container |= {"resources": trainer["resourcesPerNode"]} if "resourcesPerNode" in trainer else {}
        if "jax" in policy:
            leader = f"{meta['name']}-node-0-0.{meta['name']}:6666"
            index = {"fieldRef": {"fieldPath": f"metadata.annotations['{_INDEX}']"}}
            container["env"] = [*container.get("env", ()), {"name": "JAX_NUM_PROCESSES", "value": str(nodes)},
                                {"name": "JAX_PROCESS_ID", "valueFrom": index},
                                {"name": "JAX_COORDINATOR_ADDRESS", "value": leader}]  # fmt: skip
        job = {"completions": nodes, "parallelism": nodes,
               "template": {"spec": {"containers": [{"name": "node", **container}]}}}  # fmt: skip
        template = _overlaid(template, {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": job}}]}})
        for patch in spec.get("runtimePatches", ()):
            template = _overlaid(template, patch.get("trainingRuntimeSpec", {}).get("template", {}))
        kind = BY_NAME["JobSet"]
        found = child(body, kind.api_version, "JobSet", meta["name"], template["spec"], template.get("metadata"))
        found["spec"]["suspend"] = spec["suspend"]
        create(cluster, body, found, "JobSetCreationFailed")
    if found is not None and (found := cluster.objects.get(key)) is not None:
        if found["spec"]["suspend"] != spec["suspend"]:
            found["spec"]["suspend"] = spec["suspend"]
        set_condition(body, "Suspended", spec["suspend"], "Suspended" if spec["suspend"] else "Resumed",
                      f"TrainJob is {'suspended' if spec['suspend'] else 'resumed'}")  # fmt: skip
        body["status"]["jobsStatus"] = found.get("status", {}).get("replicatedJobsStatus", [])
        for own, other in (("Complete", "Completed"), ("Failed", "Failed")):
            if holds(found, other):
                condition = next(each for each in found["status"]["conditions"] if each["type"] == other)
                set_condition(body, own, True, condition["reason"], condition["message"])


def _job_set(cluster: "Cluster", body: Json) -> None:
    """Makes the Jobs of a JobSet and its service; restarts or ends it by its policies."""
    meta, spec = body["metadata"], body["spec"]
    status = body.setdefault("status", {"restarts": 0})
    jobs = [job for job in cluster.find("jobs", meta["namespace"], body)]
    if _ended(cluster, body):
        for job in jobs:
            if not holds(job, "Complete", "Failed") and "deletionTimestamp" not in job["metadata"]:
                cluster.delete(job, "Foreground")
        return
    attempt = str(status["restarts"])
    for job in jobs:
        if (
            job["metadata"]["labels"][f"{_SET}restart-attempt"] != attempt
            and "deletionTimestamp" not in job["metadata"]
        ):
            cluster.delete(job, "Foreground")
    jobs = [job for job in jobs if job["metadata"]["labels"][f"{_SET}restart-attempt"] == attempt]
    by_set = {each["name"]: [job for job in jobs if job["metadata"]["labels"][f"{_SET}replicatedjob-name"]
                             == each["name"]] for each in spec["replicatedJobs"]}  # fmt: skip
    status["replicatedJobsStatus"] = [_set_status(name, found) for name, found in by_set.items()]
    if failed := [job for job in jobs if holds(job, "Failed")]:
        return _fail_job_set(cluster, body, failed)
    success = spec["successPolicy"]
    targets = [each for each in spec["replicatedJobs"] if each["name"] in
               (success.get("targetReplicatedJobs") or by_set)]  # fmt: skip
    done = [sum(holds(job, "Complete") for job in by_set[each["name"]]) >= each["replicas"] for each in targets]
    some = any(holds(job, "Complete") for each in targets for job in by_set[each["name"]])
    if (done and all(done)) or (success["operator"] == "Any" and some):
        status["terminalState"] = "Completed"
        event(cluster, body, "Normal", "AllJobsCompleted", "jobset completed successfully")
        return set_condition(body, "Completed", True, "AllJobsCompleted", "jobset completed successfully")
    if spec["suspend"] or holds(body, "Suspended"):
        what = ("SuspendedJobs", "jobset is suspended") if spec["suspend"] else ("ResumeJobs", "jobset is resumed")
        set_condition(body, "Suspended", spec["suspend"], *what)
    for job in jobs:
        job["spec"]["suspend"] = spec["suspend"]
    subdomain = spec["network"].get("subdomain", meta["name"])
    if ("services", meta["namespace"], subdomain) not in cluster.objects:
        selector = {f"{_SET}jobset-name": meta["name"]}
        service = child(body, "v1", "Service", subdomain, {"clusterIP": "None", "selector": selector,
                         "publishNotReadyAddresses": spec["network"]["publishNotReadyAddresses"]})  # fmt: skip
        create(cluster, body, service, "HeadlessServiceCreationFailed")
    for each in spec["replicatedJobs"]:
        waits = [of for of in each.get("dependsOn", ()) if not _is_met(of, by_set[of["name"]])]
        if not waits:
            _make_jobs(cluster, body, each, attempt, subdomain)
        ready = sum(_is_ready(job) for job in by_set[each["name"]])
        if spec["startupPolicy"]["startupPolicyOrder"] == "InOrder" and ready < each["replicas"]:
            return


def _make_jobs(cluster: "Cluster", body: Json, each: Json, attempt: str, subdomain: str) -> None:
    """Makes the Jobs of a replicated Job that are not there."""
    meta, spec = body["metadata"], body["spec"]
    before = 0
    for other in spec["replicatedJobs"]:
        if other["name"] == each["name"]:
            break
        before += other["replicas"]
    for index in range(each["replicas"]):
        name = f"{meta['name']}-{each['name']}-{index}"
        if ("jobs", meta["namespace"], name) in cluster.objects:
            continue
        own = {
            "jobset-name": meta["name"], "jobset-uid": meta["uid"], "replicatedjob-name": each["name"],
            "replicatedjob-replicas": str(each["replicas"]), "job-index": str(index), "restart-attempt": attempt,
            "job-global-index": str(before + index), "job-key": hashlib.sha1(f"{meta['namespace']}/{name}".encode())
            .hexdigest(), "global-replicas": str(sum(other["replicas"] for other in spec["replicatedJobs"])),
        }  # fmt: skip
        if leader := spec.get("coordinator"):
            where = f"{leader['replicatedJob']}-{leader.get('jobIndex', 0)}-{leader.get('podIndex', 0)}"
            own["coordinator"] = f"{meta['name']}-{where}.{subdomain}"
        marks = {f"{_SET}{key}": value for key, value in own.items()}
        template = deepcopy(each["template"])
        job = child(body, "batch/v1", "Job", name, template["spec"], template.get("metadata"))
        job["spec"]["suspend"] = spec["suspend"]
        for part in (job["metadata"], job["spec"]["template"].setdefault("metadata", {})):
            for key in ("labels", "annotations"):
                part[key] = part.get(key, {}) | marks
        if spec["network"]["enableDNSHostnames"]:
            job["spec"]["template"]["spec"].setdefault("subdomain", subdomain)
        create(cluster, body, job, "JobCreationFailed")


def _fail_job_set(cluster: "Cluster", body: Json, failed: Sequence[Json]) -> None:
    """Restarts a JobSet of which a Job has failed, or ends it, by the first rule that matches."""
    policy, status = body["spec"].get("failurePolicy"), body["status"]
    first = failed[0]
    action, reason, message = "FailJobSet", "FailedJobs", "jobset failed due to one or more job failures"
    if policy is not None:
        matches = (
            (rule["action"], job) for rule in policy.get("rules", ()) for job in failed
            if _failure(job)["reason"] in (rule.get("onJobFailureReasons") or [_failure(job)["reason"]])
            and job["metadata"]["labels"][f"{_SET}replicatedjob-name"]
            in (rule.get("targetReplicatedJobs") or [job["metadata"]["labels"][f"{_SET}replicatedjob-name"]])
        )  # fmt: skip
        action, first = next(matches, ("RestartJobSet", failed[0]))
        reason, message = f"{action}FailurePolicyAction", f"applying {action} failure policy action"
        counted = status.get("restartsCountTowardsMax", 0)
        if action == "RestartJobSet" and counted >= policy.get("maxRestarts", 0):
            action, reason = "FailJobSet", "ReachedMaxRestarts"
            message = "jobset failed due to reaching max number of restarts"
    message += f" (first failed job: {first['metadata']['name']})"
    event(cluster, body, "Warning", reason, message)
    if action == "FailJobSet":
        status["terminalState"] = "Failed"
        return set_condition(body, "Failed", True, reason, message)
    status["restarts"] += 1
    if action == "RestartJobSet":
        status["restartsCountTowardsMax"] = status.get("restartsCountTowardsMax", 0) + 1


def _set_status(name: str, jobs: Sequence[Json]) -> Json:
    """Returns how the Jobs of a replicated Job do."""
    return {
        "name": name, "ready": sum(map(_is_ready, jobs)), "succeeded": sum(holds(job, "Complete") for job in jobs),
        "failed": sum(holds(job, "Failed") for job in jobs), "suspended": sum(job["spec"]["suspend"] for job in jobs),
        "active": sum(job.get("status", {}).get("active", 0) > 0 for job in jobs),
    }  # fmt: skip


def _is_met(depends: Json, jobs: Sequence[Json]) -> bool:
    return bool(jobs) and all(
        holds(job, "Complete") if depends["status"] == "Complete" else _is_ready(job) for job in jobs
    )


def _is_ready(job: Json) -> bool:
    status = job.get("status", {})
    return status.get("ready", 0) + status.get("succeeded", 0) >= job["spec"]["parallelism"]


def _job(cluster: "Cluster", body: Json) -> None:
    """Makes the pods of an Indexed Job, counts how they end, and ends it by its limits and policies."""
    meta, spec = body["metadata"], body["spec"]
    status = body.setdefault("status", {})
    pods = cluster.find("pods", meta["namespace"], body)
    if _ended(cluster, body):
        return
    if spec["completionMode"] != "Indexed":
        raise NotImplementedError(f"{meta['name']}: this cluster has Indexed Jobs only")
    target = next((each for each in status.get("conditions", ()) if each["type"] == "FailureTarget"), None)
    for pod in pods:
        if pod["status"]["phase"] in ("Succeeded", "Failed") and _TRACKING in pod["metadata"].get("finalizers", ()):
            pod["metadata"]["finalizers"].remove(_TRACKING)
            action, message = _outcome(spec, pod)
            if action == "Succeeded":
                done = _indexes(status.get("completedIndexes", "")) | {int(pod["metadata"]["annotations"][_INDEX])}
                status["completedIndexes"], status["succeeded"] = _ranges(done), len(done)
            elif action != "Ignore":
                status["failed"] = status.get("failed", 0) + 1
            if action == "FailJob" and target is None:
                target = _target(body, "PodFailurePolicy", message)
    alive = [pod for pod in pods if pod["status"]["phase"] in ("Pending", "Running")]
    active = [pod for pod in alive if "deletionTimestamp" not in pod["metadata"]]
    done = _indexes(status.get("completedIndexes", ""))
    if target is None and status.get("failed", 0) > spec["backoffLimit"]:
        target = _target(body, "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    if (
        target is None
        and "startTime" in status
        and age_s(status["startTime"]) >= spec.get("activeDeadlineSeconds", 1e9)
    ):
        target = _target(body, "DeadlineExceeded", "Job was active longer than specified deadline")
    if target is not None or spec["suspend"]:
        for pod in active:
            if target is None:  # what ends by suspension is no failure
                pod["metadata"]["finalizers"].remove(_TRACKING)
            cluster.delete(pod)
        active = []
    status |= {"active": len(active), "ready": sum(holds(pod, "Ready") for pod in active),
               "terminating": len(alive) - len(active)}  # fmt: skip
    if target is not None:
        if not alive:
            set_condition(body, "Failed", True, target["reason"], target["message"])
            event(cluster, body, "Warning", target["reason"], target["message"])
    elif len(done) >= spec["completions"]:
        if not alive:
            status["completionTime"] = now()
            set_condition(
                body, "SuccessCriteriaMet", True, "CompletionsReached", "Reached expected number of succeeded pods"
            )
            set_condition(body, "Complete", True, "CompletionsReached", "Reached expected number of succeeded pods")
            event(cluster, body, "Normal", "Completed", "Job completed")
    elif spec["suspend"]:
        status.pop("startTime", None)
        set_condition(body, "Suspended", True, "JobSuspended", "Job suspended")
        event(cluster, body, "Normal", "Suspended", "Job suspended")
    else:
        status.setdefault("startTime", now())
        if holds(body, "Suspended"):
            set_condition(body, "Suspended", False, "JobResumed", "Job resumed")
        taken = {int(pod["metadata"]["annotations"][_INDEX]) for pod in alive}
        missing = [index for index in range(spec["completions"]) if index not in taken | done]
        for index in missing[: max(spec["parallelism"] - len(alive), 0)]:
            _make_pod(cluster, body, index)


def _make_pod(cluster: "Cluster", body: Json, index: int) -> None:
    meta, template = body["metadata"], deepcopy(body["spec"]["template"])
    name = f"{meta['name']}-{index}-{suffix(f'{meta["uid"]}{index}{cluster.made}')}"
    pod = child(body, "v1", "Pod", name, template["spec"], template.get("metadata"))
    marks = {"batch.kubernetes.io/job-name": meta["name"], "job-name": meta["name"], _INDEX: str(index),
             "batch.kubernetes.io/controller-uid": meta["uid"], "controller-uid": meta["uid"]}  # fmt: skip
    pod["metadata"]["labels"] |= marks
    pod["metadata"]["annotations"][_INDEX] = str(index)
    pod["metadata"] |= {"finalizers": [_TRACKING], "generateName": f"{meta['name']}-{index}-"}
    pod["spec"]["hostname"] = f"{meta['name']}-{index}"
    field = {"fieldRef": {"fieldPath": f"metadata.labels['{_INDEX}']"}}
    for container in pod["spec"]["containers"]:
        container.setdefault("env", []).append({"name": "JOB_COMPLETION_INDEX", "valueFrom": field})
    if create(cluster, body, pod, "FailedCreate", "Error creating: "):
        cluster.made += 1
        event(cluster, body, "Normal", "SuccessfulCreate", f"Created pod: {name}")


def _target(body: Json, reason: str, message: str) -> Json:
    """Decides that a Job fails, which it has once its pods have ended."""
    set_condition(body, "FailureTarget", True, reason, message)
    return body["status"]["conditions"][-1]


def _outcome(spec: Json, pod: Json) -> tuple[str, str]:
    """Returns "Succeeded", or the action of the pod failure policy with the message of FailJob."""
    if pod["status"]["phase"] == "Succeeded":
        return "Succeeded", ""
    where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for number, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", ())):
        suffix = f"matching {rule['action']} rule at index {number}"
        if codes := rule.get("onExitCodes"):
            for each in pod["status"].get("containerStatuses", ()):
                code = each["state"].get("terminated", {}).get("exitCode", 0)
                meant = codes.get("containerName", each["name"]) == each["name"]
                if code and meant and (code in codes["values"]) == (codes["operator"] == "In"):
                    text = f"Container {each['name']} for pod {where} failed with exit code {code} {suffix}"
                    return rule["action"], text
        for wanted in rule.get("onPodConditions") or ():
            for each in pod["status"].get("conditions", ()):
                if each["type"] == wanted["type"] and each["status"] == wanted.get("status", "True"):
                    return rule["action"], f"Pod {where} has condition {wanted['type']} {suffix}"
    return "Count", ""


def _ended(cluster: "Cluster", body: Json) -> bool:
    """Whether a Job or JobSet has ended; deletes it when its time is over."""
    ends = [each for each in body["status"].get("conditions", ())
            if each["type"] in ("Complete", "Completed", "Failed") and each["status"] == "True"]  # fmt: skip
    if ends and age_s(ends[0]["lastTransitionTime"]) >= body["spec"].get("ttlSecondsAfterFinished", 1e9):
        cluster.delete(body)
    return bool(ends)


def _failure(job: Json) -> Json:
    return next(each for each in job["status"]["conditions"] if each["type"] == "Failed")


def _indexes(text: str) -> set[int]:
    """Returns the indexes of a text such as "0,2-4"."""
    spans = [span.partition("-") for span in text.split(",") if span]
    return {index for first, _, last in spans for index in range(int(first), int(last or first) + 1)}


def _ranges(indexes: set[int]) -> str:
    starts = [index for index in sorted(indexes) if index - 1 not in indexes]
    ends = [index for index in sorted(indexes) if index + 1 not in indexes]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _overlaid(base: Any, patch: Any) -> Any:
    """Returns a part of a runtime with a patch: dicts by their keys, and lists of what has names by these."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: _overlaid(base[key], value) if key in base else value for key, value in patch.items()}
    if isinstance(base, list) and isinstance(patch, list) and all("name" in each for each in [*base, *patch]
                                                                  if isinstance(each, dict)):  # fmt: skip
        if not all(isinstance(each, dict) for each in [*base, *patch]):
            return patch
        named = {each["name"]: each for each in base}
        for each in patch:
            named[each["name"]] = _overlaid(named.get(each["name"], {}), each)
        return [*named.values()]
    return patch
