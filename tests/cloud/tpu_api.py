"""The Cloud TPU API, version 2, for tests: its messages, states and refusals.

What the messages of the service say was seen in public logs of it. Its own permissions for queued resources are those
of nodes; an unknown zone is answered like a forbidden one; a suspended queued resource counts against the quota.
"""

import itertools
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from google.cloud import tpu_v2
from google.protobuf import empty_pb2, field_mask_pb2
from google.protobuf.message import Message

from tests.cloud import answers, catalog
from tests.cloud.answers import Asked, Json, Pace, Refused
from tests.cloud.machines import Machine
from tests.cloud.tpu_state import (
    Node,
    NodeStates,
    Queued,
    States,
    bad,
    boot,
    check_id,
    check_quota,
    check_reservation,
    json_of,
    new_node,
    no_location,
    node_ids,
    short,
    stockout,
)

if TYPE_CHECKING:
    from tests.cloud.server import Cloud

_PATH = re.compile(r"/v2/projects/([^/]+)/locations(?:/([^/:]+)(?:/(\w+)(?:/([^/:]+)(?::(\w+))?)?)?)?")
_VERBS = {"GET": "get", "POST": "create", "DELETE": "delete", "PATCH": "update"}
_DELETABLE = (States.ACCEPTED, States.FAILED, States.SUSPENDED, States.WAITING_FOR_RESOURCES)
_TYPE = "type.googleapis.com/google.cloud.tpu.v2."


class TpuApi:
    """Queued resources and nodes of all zones."""

    def __init__(self, cloud: "Cloud") -> None:
        self._cloud = cloud
        self._queued: dict[str, Queued] = {}
        self._nodes: dict[str, Node] = {}  # that exist, by full name
        self._operations: dict[str, tuple[float, Json]] = {}  # when done, and the finished operation
        self._numbers = itertools.count(1)

    # What a test does

    def preempt(self, name: str, after_s: float) -> bool:
        """Preempts a node, or all nodes of a queued resource; returns whether there are any."""
        chosen = self._called(name)
        for node in chosen:
            if not node.spot:
                raise ValueError(f"{name}: expected Spot capacity: no other is preempted")
            node.message.state = NodeStates.PREEMPTED
            for queued in self._queued.values():
                if node in queued.nodes and queued.state is States.ACTIVE:
                    queued.become(States.SUSPENDING)
                    queued.pace = Pace()
            for machine in node.machines:
                machine.preempt(after_s)
        return bool(chosen)

    def maintenance(self, name: str, start: datetime) -> bool:
        """Plans the maintenance of nodes; returns whether there are any."""
        chosen = self._called(name)
        for node in chosen:
            node.upcoming = answers.upcoming_maintenance(start)
            for machine in node.machines:
                machine.set("upcoming-maintenance", json.dumps(answers.in_metadata(node.upcoming)))
        return bool(chosen)

    def remaining(self) -> Iterator[str]:
        """Yields what exists and is not being deleted."""
        self._sweep()
        for queued in self._queued.values():
            if queued.gone_at is None:
                yield f"queued resource {queued.zone}/{short(queued.message.name)} {queued.state.name}"
        for node in self._nodes.values():
            if node.gone_at is None:
                yield f"node {node.zone}/{node.id} {node.message.state.name}"

    def machines(self) -> Iterator[Machine]:
        """Yields the machines of all nodes."""
        for node in self._nodes.values():
            yield from node.machines

    def _called(self, name: str) -> list[Node]:
        """Returns the nodes that run, of this name or of the queued resource of this name."""
        mine = [node for queued in self._queued.values() if short(queued.message.name) == name for node in queued.nodes]
        mine += [node for node in self._nodes.values() if node.id == name and node not in mine]
        return [node for node in mine if node.message.state is NodeStates.READY]

    # Requests

    def answer(self, asked: Asked) -> Json:
        """Returns the JSON of an answer."""
        self._sweep()
        match = _PATH.fullmatch(asked.path)
        if match is None:
            raise Refused(404, "NOT_FOUND", "Method not found.")
        project, zone, kind, name, verb = match.groups()
        self._cloud.check_project(project)
        parent = f"projects/{project}/locations/{zone}"
        if zone is not None and not self._cloud.known_zone(zone) and not (zone == "-" and asked.method == "GET"):
            raise no_location(project, zone)
        if kind in ("queuedResources", "nodes", "acceleratorTypes", "runtimeVersions", "operations"):
            action = verb or ("list" if asked.method == "GET" and name is None else _VERBS.get(asked.method, ""))
            resource = "nodes" if kind == "queuedResources" else kind.lower()  # queued resources have no permissions
            action_needed = {"reset": "create"}.get(action, action)
            where = f"{parent}/{kind}" + (f"/{name}" if name else "")
            self._cloud.require(asked, f"tpu.{resource}.{action_needed}", f"//tpu.googleapis.com/{where}")
            handler = getattr(self, f"_{action}_{kind}", None)
            if handler is not None:
                return handler(asked, parent, name)
        elif kind is None and asked.method == "GET":
            zones = list(catalog.ZONES) if zone is None else [zone]
            found = [{"name": f"projects/{project}/locations/{each}", "locationId": each} for each in zones]
            return {"locations": found} if zone is None else found[0]
        raise Refused(404, "NOT_FOUND", "Method not found.")

    def _create_queuedResources(self, asked: Asked, parent: str, name: None) -> Json:
        del name
        queued_id, zone = asked.query.get("queuedResourceId", ""), short(parent)
        message = tpu_v2.QueuedResource()
        asked.parsed = answers.render(answers.parse(asked.body, tpu_v2.QueuedResource.pb(message)))
        check_id("queued_resource_id", queued_id)
        full = f"{parent}/queuedResources/{queued_id}"
        if full in self._queued:
            raise answers.exists(full)
        if not message.tpu.node_spec:
            raise bad("tpu.node_spec must be set")
        if message.reservation_name:
            check_reservation(message.reservation_name, parent, self._cloud.reservations)
        named = [(spec, node_id) for spec in message.tpu.node_spec for node_id in node_ids(spec, queued_id)]
        for spec, _ in named:
            if spec.parent != parent:
                raise bad(f"node_spec.parent must be {parent}")
        nodes = [
            self._new_node(asked, spec.node, parent, each, spot="spot" in message, queued=full, siblings=len(named))
            for spec, each in named
        ]
        check_quota(nodes, self._planned(), self._cloud.quota)
        raw = tpu_v2.QueuedResource.pb(message)
        until = raw.queueing_policy
        is_limited = until.HasField("valid_until_duration")
        expires = time.monotonic() + until.valid_until_duration.ToSeconds() if is_limited else None
        message.name = full
        raw.create_time.GetCurrentTime()
        queued = Queued(message=message, zone=zone, nodes=nodes, expires=expires)
        queued.become(States.ACCEPTED)
        self._queued[full] = queued
        return self._operation(asked, parent, full, "create", raw)

    def _get_queuedResources(self, asked: Asked, parent: str, name: str) -> Json:
        return json_of(asked, tpu_v2.QueuedResource.pb(self._read(self._find_queued(parent, name)).message))

    def _list_queuedResources(self, asked: Asked, parent: str, name: None) -> Json:
        del name
        found = [queued for queued in list(self._queued.values()) if _is_in(queued.zone, parent)]
        shown, token = answers.page(found, asked.query, "pageSize")
        items = [json_of(asked, tpu_v2.QueuedResource.pb(self._read(queued).message)) for queued in shown]
        return {"queuedResources": items, "nextPageToken": token}

    def _delete_queuedResources(self, asked: Asked, parent: str, name: str) -> Json:
        queued = self._find_queued(parent, name)
        alive = [node for node in queued.nodes if node.message.name in self._nodes and node.gone_at is None]
        if alive and queued.state not in _DELETABLE and asked.query.get("force") != "true":
            message = f"Queued resource {name} in state {queued.state.name} has nodes; delete them, or set force"
            raise Refused(400, "FAILED_PRECONDITION", f"Cloud TPU received a bad request. {message}")
        queued.become(States.DELETING)
        queued.gone_at = time.monotonic() + self._cloud.delay_s
        for node in alive:
            self._delete(node)
        shown = tpu_v2.QueuedResource.pb(queued.message)
        # The service ends this operation with the queued resource where its description has nothing, so that `result()`
        # of the official client raises TypeError. The operation is never done at once, or the call itself would.
        operation = self._operation(asked, parent, queued.message.name, "delete", shown)
        return {"name": operation["name"], "metadata": operation["metadata"]}

    def _reset_queuedResources(self, asked: Asked, parent: str, name: str) -> Json:
        queued = self._find_queued(parent, name)
        if queued.state is not States.SUSPENDED:
            raise Refused(400, "FAILED_PRECONDITION", f"Queued resource {name} is not SUSPENDED")
        for node in queued.nodes:
            self._nodes.pop(node.message.name, None)
            node.power_off()
        queued.become(States.WAITING_FOR_RESOURCES)
        queued.pace = Pace()
        shown = tpu_v2.QueuedResource.pb(queued.message)
        return self._operation(asked, parent, queued.message.name, "reset", shown)

    def _create_nodes(self, asked: Asked, parent: str, name: None) -> Json:
        del name
        message = tpu_v2.Node()
        asked.parsed = answers.render(answers.parse(asked.body, tpu_v2.Node.pb(message)))
        spot = message.scheduling_config.spot or message.scheduling_config.preemptible
        node = self._new_node(asked, message, parent, asked.query.get("nodeId", ""), spot=spot, queued="", siblings=1)
        check_quota([node], self._planned(), self._cloud.quota)
        if self._cloud.is_out_of_stock(node.zone):
            return self._operation(asked, parent, node.message.name, "create", None, stockout(node.zone))
        self._nodes[node.message.name] = node
        boot(node, self._cloud)
        return self._operation(asked, parent, node.message.name, "create", tpu_v2.Node.pb(node.message))

    def _get_nodes(self, asked: Asked, parent: str, name: str) -> Json:
        return self._show(asked, self._find_node(parent, name))

    def _list_nodes(self, asked: Asked, parent: str, name: None) -> Json:
        del name
        found = [node for node in list(self._nodes.values()) if _is_in(node.zone, parent)]
        shown, token = answers.page(found, asked.query, "pageSize")
        return {"nodes": [self._show(asked, node) for node in shown], "nextPageToken": token}

    def _delete_nodes(self, asked: Asked, parent: str, name: str) -> Json:
        node = self._find_node(parent, name)
        self._delete(node)
        for queued in self._queued.values():
            if node in queued.nodes and queued.gone_at is None:
                queued.become(States.SUSPENDED)
        return self._operation(asked, parent, node.message.name, "delete", empty_pb2.Empty())

    def _update_nodes(self, asked: Asked, parent: str, name: str) -> Json:
        node = self._find_node(parent, name)
        change = answers.parse(asked.body, tpu_v2.Node.pb(tpu_v2.Node()))
        asked.parsed = answers.render(change)
        mask = field_mask_pb2.FieldMask()
        mask.FromJsonString(asked.query.get("updateMask", ""))
        if not mask.paths or set(mask.paths) - {"description", "tags", "labels", "metadata"}:
            raise bad(f"update_mask: {list(mask.paths)} cannot be updated")
        if node.message.state is not NodeStates.READY:
            state = node.message.state.name
            raise bad(f"update is not supported while in state {state}")
        for path in mask.paths:
            setattr(node.message, path, getattr(tpu_v2.Node(change), path))
        answers.check_labels(node.message.labels)
        answers.check_metadata(node.message.metadata)
        for machine in node.machines:
            for key, value in node.message.metadata.items():
                machine.set(f"attributes/{key}", value)
        return self._operation(asked, parent, node.message.name, "update", tpu_v2.Node.pb(node.message))

    def _stop_nodes(self, asked: Asked, parent: str, name: str) -> Json:
        node = self._find_node(parent, name)
        if node.slice.num_hosts > 1:
            raise Refused(400, "FAILED_PRECONDITION", "Cloud TPU received a bad request. TPU Pods cannot be stopped")
        self._cloud.later(node.power_off)
        node.message.state = NodeStates.STOPPED
        return self._operation(asked, parent, node.message.name, "stop", tpu_v2.Node.pb(node.message))

    def _start_nodes(self, asked: Asked, parent: str, name: str) -> Json:
        node = self._find_node(parent, name)
        if node.message.state is not NodeStates.STOPPED:
            raise Refused(400, "FAILED_PRECONDITION", f"Node {name} is not STOPPED")
        boot(node, self._cloud)
        return self._operation(asked, parent, node.message.name, "start", tpu_v2.Node.pb(node.message))

    def _list_acceleratorTypes(self, asked: Asked, parent: str, name: None) -> Json:
        del name
        found, token = answers.page(catalog.accelerator_types(short(parent)), asked.query, "pageSize")
        items = [{"name": f"{parent}/acceleratorTypes/{each}", "type": each} for each in found]
        return {"acceleratorTypes": items, "nextPageToken": token}

    def _get_acceleratorTypes(self, asked: Asked, parent: str, name: str) -> Json:
        del asked
        full = f"{parent}/acceleratorTypes/{name}"
        if name not in catalog.accelerator_types(short(parent)):
            raise answers.not_found(full)
        return {"name": full, "type": name}

    def _list_runtimeVersions(self, asked: Asked, parent: str, name: None) -> Json:
        del name
        found, token = answers.page(catalog.RUNTIME_VERSIONS, asked.query, "pageSize")
        items = [{"name": f"{parent}/runtimeVersions/{each}", "version": each} for each in found]
        return {"runtimeVersions": items, "nextPageToken": token}

    def _get_operations(self, asked: Asked, parent: str, name: str) -> Json:
        del asked
        if (full := f"{parent}/operations/{name}") not in self._operations:
            raise answers.not_found(full)
        return self._shown_operation(full)

    # States

    def _read(self, queued: Queued) -> Queued:
        """Moves a queued resource one state on, if it is time."""
        if queued.gone_at is not None or not queued.pace.is_due(self._cloud.delay_s):
            return queued
        match queued.state:
            case States.ACCEPTED:
                queued.become(States.WAITING_FOR_RESOURCES)
            case States.WAITING_FOR_RESOURCES if queued.expires is not None and time.monotonic() > queued.expires:
                queued.become(States.FAILED, "The queued resource was not provisioned while it was valid.")
            case States.WAITING_FOR_RESOURCES if not self._cloud.is_out_of_stock(queued.zone):
                queued.become(States.PROVISIONING)
                self._nodes |= {node.message.name: node for node in queued.nodes}
            case States.PROVISIONING:
                for index, node in enumerate(queued.nodes):
                    boot(node, self._cloud, index, len(queued.nodes))
                queued.become(States.ACTIVE)
            case States.SUSPENDING:
                queued.become(States.SUSPENDED)
            case _:
                pass
        return queued

    def _sweep(self) -> None:
        """Forgets what was deleted some time ago."""
        now = time.monotonic()
        self._queued = {key: each for key, each in self._queued.items() if each.gone_at is None or each.gone_at > now}
        self._nodes = {key: each for key, each in self._nodes.items() if each.gone_at is None or each.gone_at > now}

    def _delete(self, node: Node) -> None:
        node.message.state, node.gone_at = NodeStates.DELETING, time.monotonic() + self._cloud.delay_s
        self._cloud.later(node.power_off)

    def _planned(self) -> list[Node]:
        """Returns all nodes that count against the quota: those of a suspended queued resource do, too."""
        nodes = {node.message.name: node for queued in self._queued.values() for node in queued.nodes}
        return list((nodes | self._nodes).values())

    def _new_node(
        self, asked: Asked, spec: tpu_v2.Node, parent: str, node_id: str, *, spot: bool, queued: str, siblings: int
    ) -> Node:
        """Returns a node that the service accepts, and that the sender may have."""
        node = new_node(spec, parent=parent, node_id=node_id, spot=spot, queued=queued, siblings=siblings)
        if any(node.message.name == other.message.name for other in self._planned()):
            raise answers.exists(node.message.name)
        email = spec.service_account.email or self._cloud.service_account
        self._cloud.require(asked, "iam.serviceAccounts.actAs", f"projects/-/serviceAccounts/{email}")
        return node

    def _find_queued(self, parent: str, name: str) -> Queued:
        if (full := f"{parent}/queuedResources/{name}") not in self._queued:
            raise answers.not_found(full)
        return self._queued[full]

    def _find_node(self, parent: str, name: str) -> Node:
        if (full := f"{parent}/nodes/{name}") not in self._nodes:
            raise answers.not_found(full)
        return self._nodes[full]

    def _show(self, asked: Asked, node: Node) -> Json:
        """Returns a node as JSON, with what the service tells and the official client does not know yet."""
        if node.message.queued_resource in self._queued:
            self._read(self._queued[node.message.queued_resource])
        shown = json_of(asked, tpu_v2.Node.pb(node.message))
        return shown | ({"upcomingMaintenance": node.upcoming} if node.upcoming else {})

    def _operation(
        self, asked: Asked, parent: str, target: str, verb: str, result: Message | None, error: str = ""
    ) -> Json:
        """Starts a long-running operation, which is done at once if states do not last."""
        name = f"{parent}/operations/operation-{next(self._numbers)}"
        metadata = {"@type": f"{_TYPE}OperationMetadata", "createTime": answers.now(), "target": target, "verb": verb}
        finished: Json = {"name": name, "done": True, "metadata": metadata | {"apiVersion": "v2"}}
        if error:
            finished["error"] = {"code": 8, "message": error}
        elif result is not None:
            kind = {"@type": f"type.googleapis.com/{result.DESCRIPTOR.full_name}"}
            finished["response"] = kind | ({"value": {}} if verb == "delete" and not result.ListFields() else {})
            finished["response"] |= json_of(asked, result)
        self._operations[name] = (time.monotonic() + self._cloud.delay_s, finished)
        return self._shown_operation(name)

    def _shown_operation(self, name: str) -> Json:
        done_at, finished = self._operations[name]
        if time.monotonic() >= done_at:
            return finished
        return {"name": name, "metadata": finished["metadata"]}


def _is_in(zone: str, parent: str) -> bool:
    """Whether a zone is the one of a list, which may be of all."""
    return short(parent) in ("-", zone)
