"""TPU VMs of the Cloud TPU API: one that exists, or slices that a queued resource makes."""

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.google_cloud import (
    BY_KEYS,
    INSTALL,
    LABEL,
    RUN_LABEL,
    SCOPE,
    SSH_KEYS,
    GooglePlace,
    Origin,
    api_url,
    body_of,
    call,
    change,
    client_of,
    find,
    items_of,
    refusal,
)
from jaxinfra.launchers.places.google_errors import Stockout, error_of
from jaxinfra.launchers.places.images import accelerator_type, tpu_type
from jaxinfra.launchers.places.place import Host, PlaceOptions, Request, Resource, Say
from jaxinfra.packages import import_optional
from jaxinfra.plan.topology import Topology

_LOST = {"SUSPENDING", "SUSPENDED"}  # of a queued resource
_LOST_NODE = {"PREEMPTED", "TERMINATED", "DELETING", "HIDING", "HIDDEN"}
_STOPPED_NODE = {"STOPPING", "STOPPED"}
_HTTP = {3: 400, 5: 404, 6: 409, 7: 403, 9: 400, 16: 401}  # HTTP's code by that of gRPC


class TpuVm(GooglePlace):
    """See `HostSource`."""

    def __init__(self, options: PlaceOptions, run_location: str, *, poll_s: float = 2.0) -> None:
        super().__init__(options, run_location, poll_s=poll_s)
        if self.topology is not None:
            tpu_type(self.topology)  # raises for chips that this API does not have
        self._zone = f"projects/{self.options.project}/locations/{self.options.zone}"
        self._name = f"{self._zone}/queuedResources/{self.options.name}"
        self._what = f"TPU VM {self.options.name} in {self.options.zone}"
        self._creation: Any = None  # the operation, until it has ended

    @cached_property
    def _client(self) -> Any:
        return client_of("tpu_v2", "TpuClient")

    def step(self, say: Say) -> Sequence[Host] | str:
        """See `GooglePlace.step`."""
        if self.topology is None:
            nodes = self._existing()
            return self._waiting(nodes) or self._hosts(nodes)
        resource = self._resource()
        if resource is None:
            return self._create(say, self.topology)
        if not self._is_ours(resource):
            specs = resource.tpu.node_spec
            self.check_owner("queued resource", specs[0].node.description if specs else "")
        self._creation = None
        state, name = resource.state.state.name, f"queued resource {self.options.name}"
        if state == "FAILED":
            failure = self._failure(resource)
            if not self.may_retry():
                return str(failure)
        nodes = self._nodes_of(resource) if state == "ACTIVE" else []
        lost = "preempted" if state in _LOST else self._lost_nodes(nodes)
        lost = "failed" if state == "FAILED" else lost
        if lost:
            say(f"{name}: {lost}; deletes it to make it again")
            self._delete()
            return f"{name} is being deleted"
        if state != "ACTIVE":
            return f"{name} is {state.lower().replace('_', ' ')}"
        return self._waiting(nodes) or self._hosts(nodes)

    def current(self) -> Sequence[Host]:
        """See `HostSource.current`."""
        self.has_asked = True
        if self.topology is None:
            nodes = self._named(sorted(self._all_nodes(), key=_order))
        else:
            resource = self._resource()
            nodes = self._nodes_of(resource) if resource is not None and self._is_ours(resource) else []
        return self._hosts([node for node in nodes if node.state.name == "READY"])

    def lost(self) -> str:
        """See `HostSource.lost`."""
        self.has_asked = True
        if self.topology is None:
            return self._lost_nodes(self._existing())
        resource = self._resource()
        if resource is None:
            return "deleted"
        state = resource.state.state.name
        if state in _LOST:
            return "preempted"
        if state != "ACTIVE":
            return f"queued resource {state.lower().replace('_', ' ')}"
        nodes = self._nodes_of(resource)
        if len(nodes) < self.topology.slices:
            return f"{self.topology.slices - len(nodes)} of {self.topology.slices} TPU VMs deleted"
        return self._lost_nodes(nodes)

    def delete(self, say: Say, only: Collection[str] | None) -> None:
        """See `GooglePlace.delete`."""
        if self.topology is None or (only is not None and self.options.name not in only):
            return
        resource = self._resource()
        if resource is not None and self._is_ours(resource) and resource.state.state.name != "DELETING":
            self._delete()
            say(f"deleted queued resource {self.options.name} in {self.options.zone}, and its TPU VMs")

    def requests(self) -> Sequence[Request]:
        """See `HostSource.requests`."""
        url, name = f"{api_url('tpu')}/v2/{self._zone}", self.options.name
        queued, node = f"{url}/queuedResources", f"{url}/nodes/{name}"
        keys = f'{{"metadata": {{..., "{SSH_KEYS}": "..."}}}}'
        sent = [
            Request("GET", f"{url}/nodes", "reads the addresses"),
            Request("PATCH", f"{node}?updateMask=metadata", "if it does not have this ssh key", keys),
            Request("GET", node, "sees whether the key stays"),
            Request("GET", f"{url}/operations/OPERATION", "sees whether it is done"),
        ]
        if self.topology is None:
            return sent
        body = body_of(self._message(self.topology, makes_key=False))
        return [
            Request("GET", f"{queued}/{name}", "sees whether it exists, and is active"),
            Request("POST", f"{queued}?queuedResourceId={name}", f"makes {name}, and its TPU VMs", body),
            *sent,
            Request("DELETE", f"{queued}/{name}?force=true", "at the end, or to make it again"),
        ]

    def deletion(self) -> Sequence[str]:
        """See `HostSource.deletion`."""
        return () if self.topology is None else [f"{api_url('tpu')}/v2/{self._name}?force=true"]

    def _resource(self) -> Any:
        return find(self._what, self._client.get_queued_resource, {"name": self._name})

    def _create(self, say: Say, topology: Topology) -> str:
        what, waiting = (
            f"--create {topology} in {self.options.zone}",
            f"queued resource {self.options.name} is requested",
        )
        if self._creation is not None:
            creation, self._creation = self._creation, None  # one that has failed is not asked again
            if not self._has_ended(what, creation):
                self._creation = creation
                return waiting
        request = {
            "parent": self._zone,
            "queued_resource_id": self.options.name,
            "queued_resource": self._message(topology),
        }
        self.check_goes_on()
        self._creation = change(what, self._client.create_queued_resource, request)
        self.made.add(self.options.name)
        say(f"requested {topology} in {self.options.zone} as queued resource {self.options.name}")
        return waiting

    def _message(self, topology: Topology, *, makes_key: bool = True) -> Any:
        """Returns the queued resource to make."""
        options, kind = self.options, tpu_type(topology)
        node: dict[str, Any] = {
            "description": str(self.origin),
            "runtime_version": options.image or kind.runtime_version,
            "network_config": {"enable_external_ips": not options.internal_ips},
            "service_account": {"email": options.service_account, "scope": [SCOPE]},
            "labels": self.labels,
            "metadata": {**BY_KEYS, SSH_KEYS: self.key_line(makes_key=makes_key)},
        }
        network = "subnetwork" if "subnetworks/" in options.network else "network"
        node["network_config"][network] = options.network
        if name := accelerator_type(topology):
            node["accelerator_type"] = name
        else:
            sizes = "x".join(map(str, topology.shape))
            node["accelerator_config"] = {"type_": kind.config_type, "topology": sizes}
        spec: dict[str, Any] = {"parent": self._zone, "node": node}
        if topology.slices > 1:
            spec["multislice_params"] = {"node_count": topology.slices, "node_id_prefix": options.name}
        else:
            spec["node_id"] = options.name
        resource: dict[str, Any] = {
            "tpu": {"node_spec": [spec]},
            "queueing_policy": {"valid_until_duration": {"seconds": round(options.wait_hours * 3600)}},
        }
        if options.spot:
            resource["spot"] = {}
        if options.reservation:
            # `guaranteed` without its name would be for a reservation of the whole project.
            resource["guaranteed"] = {}
            is_path = "/" in options.reservation
            name = options.reservation if is_path else f"{self._zone}/reservations/{options.reservation}"
            resource["reservation_name"] = name
        tpu = import_optional("google.cloud.tpu_v2", needed_by="--place tpu-vm", install=INSTALL)
        return tpu.QueuedResource(resource)

    def _delete(self) -> None:
        what = f"delete {self._what}"
        request = {"name": self._name, "force": True}
        operation = self.ask_to_delete(what, self._client.delete_queued_resource, request)
        if operation is not None:
            self._finish(what, operation)

    def _finish(self, what: str, operation: Any) -> None:
        self.wait_for(what, operation.operation.name, lambda: self._has_ended(what, operation))

    def _has_ended(self, what: str, operation: Any) -> bool:
        """Whether an operation has ended; raises what it has failed with."""
        # The client takes the answer of a deletion for something else than it is, and raises TypeError.
        now = call(what, self._client.get_operation, {"name": operation.operation.name})
        if now.done and now.error.code:
            raise refusal(what, _HTTP.get(now.error.code, 500), " ".join(now.error.message.split()))
        return now.done

    def _failure(self, resource: Any) -> Stockout:
        """Returns why the cloud has given up, if asking again may help; raises ConfigError if not."""
        error = resource.state.failed_data.error
        reason = " ".join(error.message.split()) or "no reason given"
        found = error_of(f"--create {self.origin.chips} in {self.options.zone}", _HTTP.get(error.code, 500), reason)
        if isinstance(found, ConfigError):
            raise found
        return Stockout(f"queued resource {self.options.name} failed: {reason}")

    def _is_ours(self, resource: Any) -> bool:
        return any(spec.node.labels.get(RUN_LABEL) == self.labels[RUN_LABEL] for spec in resource.tpu.node_spec)

    def _nodes_of(self, resource: Any) -> list[Any]:
        """Returns the TPU VMs of a queued resource by slice; those that are deleted are left out."""
        names: list[str] = []
        for spec in resource.tpu.node_spec:
            if spec.node_id:
                names.append(spec.node_id)
            prefix = spec.multislice_params.node_id_prefix or resource.name.rpartition("/")[2]
            names.extend(f"{prefix}-{index}" for index in range(spec.multislice_params.node_count))
        found = {_id(node): node for node in self._all_nodes()}
        return [found[name] for name in names if name in found]

    def _all_nodes(self) -> list[Any]:
        return items_of(self._what, self._client.list_nodes, {"parent": self._zone})

    def _existing(self) -> list[Any]:
        """Returns the TPU VM of this name, or those of the queued resource of this name."""
        nodes, name = sorted(self._all_nodes(), key=_order), self.options.name
        found = self._named(nodes)
        if not found:
            others = ", ".join(_id(node) for node in nodes) or "none"
            raise ConfigError(
                f"--name {name}: no TPU VM of this name in {self.options.zone}, which has: {others}; use --create v6e-8"
                " to make one"
            )
        for node in found:
            if node.state.name in _STOPPED_NODE:
                start = f"gcloud compute tpus tpu-vm start {_id(node)} --zone {self.options.zone}"
                raise ConfigError(f"--name {name}: TPU VM {_id(node)} is {node.state.name}; run `{start}`")
        return found

    def _named(self, nodes: Sequence[Any]) -> list[Any]:
        found = [node for node in nodes if _id(node) == self.options.name]
        return found or [node for node in nodes if node.queued_resource.rpartition("/")[2] == self.options.name]

    def _waiting(self, nodes: Sequence[Any]) -> str:
        """Returns which TPU VM is waited for, "" if all have booted."""
        if self.topology is not None and len(nodes) < self.topology.slices:
            return f"{len(nodes)} of {self.topology.slices} TPU VMs of {self.options.name} exist"
        for node in nodes:
            if node.state.name in _LOST_NODE:  # of one that was not made for this run
                raise ConfigError(f"--name {self.options.name}: TPU VM {_id(node)} is {node.state.name}; use --create")
            if node.state.name != "READY" or not all(each.ip_address for each in node.network_endpoints):
                return f"TPU VM {_id(node)} is {node.state.name.lower()}"
        return ""

    def _lost_nodes(self, nodes: Sequence[Any]) -> str:
        for node in nodes:
            if node.state.name in _LOST_NODE | _STOPPED_NODE:
                return f"TPU VM {_id(node)} {node.state.name.lower()}"
        return ""

    def _with_key(self, node: Any) -> Any:
        """Adds our key to a TPU VM that does not have it."""
        what = f"add the ssh key to TPU VM {_id(node)}"

        def write(found: Any, keys: str) -> None:
            changed = {"name": found.name, "metadata": {**found.metadata, SSH_KEYS: keys}}
            request = {"node": changed, "update_mask": {"paths": ["metadata"]}}
            self._finish(what, change(what, self._client.update_node, request))

        return self.let_in(
            what,
            node,
            keys=lambda found: found.metadata.get(SSH_KEYS, ""),
            write=write,
            read=lambda: find(what, self._client.get_node, {"name": node.name}),
        )

    def _hosts(self, nodes: Sequence[Any]) -> list[Host]:
        """Returns the hosts of TPU VMs, once they have our key."""
        return [
            self.host(
                f"{_id(node)}-w{index}",
                made=f"{node.create_time.timestamp():.0f}",
                internal=endpoint.ip_address,
                external=endpoint.access_config.external_ip,
                slice=number,
            )
            for number, node in enumerate(map(self._with_key, nodes))
            for index, endpoint in enumerate(node.network_endpoints)
        ]


def list_resources(project: str, zone: str = "-") -> list[Resource]:
    """Returns what runs have made in a zone, or in all."""
    client, parent = client_of("tpu_v2", "TpuClient"), f"projects/{project}/locations/{zone}"
    nodes: dict[str, list[Any]] = {}
    for node in items_of(f"list TPU VMs of {project}", client.list_nodes, {"parent": parent}):
        nodes.setdefault(node.queued_resource, []).append(node)
    resources: list[Resource] = []
    for each in items_of(f"list queued resources of {project}", client.list_queued_resources, {"parent": parent}):
        specs = each.tpu.node_spec
        if not specs or LABEL not in specs[0].node.labels:
            continue
        origin = Origin.parse(specs[0].node.description)
        notices = [f"{_id(node)}: {_notice(node)}" for node in nodes.get(each.name, ()) if _notice(node)]
        resources.append(
            Resource(
                kind="queued resource",
                name=each.name.rpartition("/")[2],
                run=origin.run if origin else "",
                zone=each.name.split("/")[3],
                state=each.state.state.name,
                chips=origin.chips if origin else specs[0].node.accelerator_type,
                spot="spot" in each,
                created=each.create_time.rfc3339() if each.create_time else "",
                notice="; ".join(notices),
            )
        )
    return resources


def _notice(node: Any) -> str:
    """Returns what a person should know of a TPU VM. The client knows no maintenance that is only planned."""
    if node.state.name != "READY":
        return node.state.name
    health = "" if node.health.name in ("HEALTHY", "HEALTH_UNSPECIFIED") else node.health.name
    symptoms = [f"{each.symptom_type.name} of worker {each.worker_id}" for each in node.symptoms]
    return ", ".join(filter(None, [health, node.health_description, *symptoms]))


def _id(node: Any) -> str:
    return node.name.rpartition("/")[2]


def _order(node: Any) -> tuple[str, int]:
    """Sorts NAME-2 before NAME-10."""
    match = re.fullmatch(r"(.*?)-?([0-9]*)", _id(node))
    return (match[1], int(match[2] or 0)) if match else (_id(node), 0)
