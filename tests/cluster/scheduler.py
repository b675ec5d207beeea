"""The scheduler, which binds pods to nodes, and the quotas of namespaces, with the messages of the real ones."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tests.cluster.objects import event, set_condition, summed
from tests.cluster.schemas import Json, quantity

if TYPE_CHECKING:
    from tests.cluster.server import Cluster


def schedule(cluster: "Cluster") -> None:
    """Binds pods to nodes, or says why it cannot."""
    for pod in cluster.find("pods"):
        if "nodeName" in pod["spec"] or pod["status"]["phase"] != "Pending" or "deletionTimestamp" in pod["metadata"]:
            continue
        problem = _unbound_claim(cluster, pod)
        reasons = Counter[str]()
        nodes = cluster.find("nodes")
        for node in nodes if not problem else ():
            found = _misfits(cluster, pod, node)
            if not found:
                pod["spec"]["nodeName"] = node["metadata"]["name"]
                set_condition(pod, "PodScheduled", True, "")
                where = f"{pod['metadata']['namespace']}/{pod['metadata']['name']} to {node['metadata']['name']}"
                event(cluster, pod, "Normal", "Scheduled", f"Successfully assigned {where}")
                break
            reasons.update(found)
        else:
            texts = ", ".join(sorted(f"{count} {reason}" for reason, count in reasons.items()))
            message = problem or f"0/{len(nodes)} nodes are available: {texts}. preemption: 0/{len(nodes)} nodes are "
            message += "" if problem else f"available: {len(nodes)} Preemption is not helpful for scheduling."
            message = message if nodes else "no nodes available to schedule pods"
            set_condition(pod, "PodScheduled", False, "Unschedulable", message)
            event(cluster, pod, "Warning", "FailedScheduling", message)


def _unbound_claim(cluster: "Cluster", pod: Json) -> str:
    for volume in pod["spec"].get("volumes", ()):
        name = volume.get("persistentVolumeClaim", {}).get("claimName")
        if name and ("persistentvolumeclaims", pod["metadata"]["namespace"], name) not in cluster.objects:
            return f'persistentvolumeclaim "{name}" not found'
    return ""


def _misfits(cluster: "Cluster", pod: Json, node: Json) -> list[str]:
    """Returns why a pod cannot go to a node, in the words of the scheduler's plugins."""
    spec, labels = pod["spec"], node["metadata"].get("labels", {})
    if node["spec"].get("unschedulable"):
        return ["node(s) were unschedulable"]
    for taint in node["spec"].get("taints", ()):
        if taint["effect"] != "PreferNoSchedule" and not any(
            _tolerates(each, taint) for each in spec.get("tolerations", ())
        ):
            return [f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"]
    if not spec.get("nodeSelector", {}).items() <= labels.items():
        return ["node(s) didn't match Pod's node affinity/selector"]
    here = [
        each for each in cluster.pods_on(node["metadata"]["name"]) if each["status"]["phase"] in ("Pending", "Running")
    ]
    used = summed(requests(each["spec"]) for each in here)
    room = {name: quantity(amount) for name, amount in node["status"]["allocatable"].items()}
    short = [name for name, amount in requests(spec).items() if used.get(name, 0.0) + amount > room.get(name, 0.0)]
    return [f"Insufficient {name}" for name in short] + (["Too many pods"] if len(here) >= room["pods"] else [])


def _tolerates(toleration: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", "")


def requests(spec: Json) -> dict[str, float]:
    """Returns what the containers of a pod ask for; a limit without a request is one."""
    resources = [container.get("resources", {}) for container in spec["containers"]]
    asked = [each.get("limits", {}) | each.get("requests", {}) for each in resources]
    return summed({name: quantity(amount) for name, amount in each.items()} for each in asked)


def _counted(pod: Json) -> dict[str, float]:
    """Returns what a pod counts for quotas."""
    asked = requests(pod["spec"])
    return {**asked, **{f"requests.{name}": amount for name, amount in asked.items()}, "pods": 1.0}


def exceeded_quota(cluster: "Cluster", pod: Json) -> str:
    """Returns why a ResourceQuota refuses a pod; "" if none does."""
    namespace = pod["metadata"]["namespace"]
    alive = [each for each in cluster.find("pods", namespace) if each["status"]["phase"] in ("Pending", "Running")]
    used, asked = summed(map(_counted, alive)), _counted(pod)
    for quota in cluster.find("resourcequotas", namespace):
        for name, limit in quota["spec"]["hard"].items():
            more, now_used = asked.get(name, 0.0), used.get(name, 0.0)
            if more and now_used + more > quantity(limit):
                amounts = f"requested: {name}={more:g}, used: {name}={now_used:g}, limited: {name}={limit}"
                return f"exceeded quota: {quota['metadata']['name']}, {amounts}"
    return ""
