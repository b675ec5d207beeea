"""Parts of objects that controllers write: conditions, events, what belongs to another, generated names."""

import hashlib
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tests.cluster.schemas import BY_NAME, Json, Refused

if TYPE_CHECKING:
    from tests.cluster.server import Cluster

_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # of generated names


def now() -> str:
    """Returns the time as objects have it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def set_condition(body: Json, kind: str, status: bool, reason: str, message: str = "") -> None:
    """Sets a condition in the status of an object."""
    conditions = body.setdefault("status", {}).setdefault("conditions", [])
    new = {"type": kind, "status": str(status), "reason": reason, "message": message}
    found = next((each for each in conditions if each["type"] == kind), None)
    if found is None:
        conditions.append(found := {"lastTransitionTime": now()})
    elif found["status"] != new["status"]:
        found["lastTransitionTime"] = now()
    found |= new


def disrupt(pod: Json, reason: str, message: str) -> None:
    """Says that the cluster ends a pod, not the pod itself."""
    set_condition(pod, "DisruptionTarget", True, reason, message)


def event(cluster: "Cluster", body: Json, kind: str, reason: str, message: str) -> None:
    """Records an event of an object, once."""
    meta = body["metadata"]
    code = hashlib.sha256(f"{meta['uid']}{reason}{message}".encode()).hexdigest()[:16]
    name, namespace = f"{meta['name']}.{code}", meta.get("namespace", "default")
    about = {"kind": body["kind"], "namespace": namespace, "name": meta["name"], "uid": meta["uid"],
             "apiVersion": body["apiVersion"]}  # fmt: skip
    stamp = now()
    cluster.objects.setdefault(("events", namespace, name), {
        "kind": "Event", "apiVersion": "v1", "involvedObject": about, "reason": reason, "message": message,
        "type": kind, "count": 1, "firstTimestamp": stamp, "lastTimestamp": stamp,
        "metadata": {"name": name, "namespace": namespace, "uid": code, "creationTimestamp": stamp},
    })  # fmt: skip


def child(owner: Json, version: str, kind: str, name: str, spec: Json, meta: Json | None = None) -> Json:
    """Returns an object that another owns."""
    of = {"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
          "uid": owner["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True}  # fmt: skip
    kept = {key: {**(meta or {}).get(key, {})} for key in ("labels", "annotations")}
    own = {"name": name, "namespace": owner["metadata"]["namespace"], "ownerReferences": [of], **kept}
    return {"apiVersion": version, "kind": kind, "metadata": own, "spec": spec}


def create(cluster: "Cluster", owner: Json, body: Json, reason: str, prefix: str = "") -> bool:
    """Makes an object, or records why it is refused."""
    try:
        cluster.create(BY_NAME[body["kind"]], body)
    except Refused as refused:
        event(cluster, owner, "Warning", reason, prefix + refused.message)
        return False
    return True


def holds(body: Json, *kinds: str) -> bool:
    """Whether one of these conditions is true."""
    conditions = body.get("status", {}).get("conditions", ())
    return any(each["type"] in kinds and each["status"] == "True" for each in conditions)


def age_s(stamp: str) -> float:
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()


def suffix(text: str) -> str:
    """Returns the end of a generated name, which is the same when the same is tried again."""
    return "".join(_LETTERS[byte % len(_LETTERS)] for byte in hashlib.sha256(text.encode()).digest()[:5])


def summed(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total
