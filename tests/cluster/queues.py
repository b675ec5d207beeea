"""Kueue: a workload is suspended until its queue has quota for it."""

from typing import TYPE_CHECKING

from tests.cluster.objects import child, holds, set_condition, suffix, summed
from tests.cluster.scheduler import requests
from tests.cluster.schemas import BY_NAME, Json

if TYPE_CHECKING:
    from tests.cluster.server import Cluster

_QUEUE = "kueue.x-k8s.io/queue-name"


def queue(cluster: "Cluster", body: Json) -> None:
    """Kueue: keeps what asks for a queue suspended until the queue has quota for it."""
    meta, spec = body["metadata"], body["spec"]
    queue = meta.get("labels", {}).get(_QUEUE)
    if queue is None or "ownerReferences" in meta or "deletionTimestamp" in meta:
        return
    name = f"{body['kind'].lower()}-{meta['name']}-{suffix(meta['uid'])}"
    workload = cluster.objects.get(("workloads", meta["namespace"], name))
    if workload is None:
        kind = BY_NAME["Workload"]
        sets = [{"name": name, "count": count, "template": template} for name, count, template in _pod_sets(body)]
        workload = child(body, kind.api_version, "Workload", name, {"queueName": queue, "podSets": sets})
        cluster.create(kind, workload)
    ended = holds(body, "Complete", "Completed", "Failed")
    if ended or not holds(workload, "QuotaReserved"):
        if ended:
            return set_condition(workload, "Finished", True, "JobFinished", "Job finished")
        problem = _unadmitted(cluster, workload)
        if not problem:
            return set_admitted(cluster, workload, admitted=True)
        set_condition(workload, "QuotaReserved", False, *problem)
        spec["suspend"] = True


def _unadmitted(cluster: "Cluster", workload: Json) -> tuple[str, str] | None:
    """Returns the reason and the message why a queue has no quota for a workload; None if it has."""
    queue = workload["spec"]["queueName"]
    if ("localqueues", workload["metadata"]["namespace"], queue) not in cluster.objects:
        return "Inadmissible", f"LocalQueue {queue} doesn't exist"
    holding = [
        each for each in cluster.find("workloads")
        if each["spec"]["queueName"] == queue and holds(each, "QuotaReserved") and not holds(each, "Finished")
    ]  # fmt: skip
    used, quota = summed(map(_total, holding)), cluster.quotas[queue]
    for name, amount in sorted(_total(workload).items()):
        where = f"couldn't assign flavors to pod set {workload['spec']['podSets'][0]['name']}:"
        if name not in quota:
            return "Pending", f"{where} resource {name} unavailable in ClusterQueue"
        if (more := used.get(name, 0.0) + amount - quota[name]) > 0:
            return (
                "Pending",
                f"{where} insufficient unused quota for {name} in flavor default-flavor, {more:g} more needed",
            )
    return None if quota else ("Pending", f"ClusterQueue {queue} has no quota left")


def _pod_sets(body: Json) -> list[tuple[str, int, Json]]:
    spec = body["spec"]
    if body["kind"] == "Job":
        return [("main", spec["parallelism"], spec["template"])]
    if body["kind"] == "JobSet":
        return [(job["name"], job["replicas"] * job["template"]["spec"].get("parallelism", 1),
                 job["template"]["spec"]["template"]) for job in spec["replicatedJobs"]]  # fmt: skip
    trainer = spec.get("trainer", {})
    container = {"name": "node", "resources": trainer.get("resourcesPerNode", {})}
    return [("node", trainer.get("numNodes", 1), {"spec": {"containers": [container]}})]


def _total(workload: Json) -> dict[str, float]:
    """Returns what all pods of a workload ask for."""
    return summed(
        {name: amount * each["count"] for name, amount in requests(each["template"]["spec"]).items()}
        for each in workload["spec"]["podSets"]
    )


def set_admitted(cluster: "Cluster", workload: Json, *, admitted: bool) -> None:
    """Has a queue admit a workload, or take back that it has."""
    queue = workload["spec"]["queueName"]
    message = f"Quota reserved in ClusterQueue {queue}" if admitted else "Preempted to accommodate a workload"
    set_condition(workload, "QuotaReserved", admitted, "QuotaReserved" if admitted else "Pending", message)
    if admitted:
        set_condition(workload, "Admitted", True, "Admitted", "The workload is admitted")
    else:
        set_condition(workload, "Admitted", False, "NoReservation", "The workload has no reservation")
        set_condition(workload, "Evicted", True, "Preempted", message)
    for plural in ("jobs", "jobsets", "trainjobs"):
        for body in cluster.find(plural):
            if body["metadata"]["uid"] == workload["metadata"]["ownerReferences"][0]["uid"]:
                body["spec"]["suspend"] = not admitted
