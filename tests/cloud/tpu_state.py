"""What the Cloud TPU API of tests keeps: queued resources and nodes, with their rules and states."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.cloud import tpu_v2
from google.protobuf import json_format
from google.protobuf.message import Message

from tests.cloud import answers, catalog
from tests.cloud.answers import NAME, Asked, Json, Pace, Refused, bad_field, invalid
from tests.cloud.machines import Machine

if TYPE_CHECKING:
    from tests.cloud.server import Cloud

States, NodeStates = tpu_v2.QueuedResourceState.State, tpu_v2.Node.State
_CLOUD_PLATFORM = "https://www.googleapis.com/auth/cloud-platform"


@dataclass(kw_only=True)
class Node:
    """A slice that exists, or is to exist when its queued resource has capacity."""

    message: tpu_v2.Node
    zone: str
    slice: catalog.Slice
    spot: bool
    machines: list[Machine] = field(default_factory=list)
    upcoming: Json | None = None  # maintenance
    gone_at: float | None = None

    @property
    def id(self) -> str:
        """Its name within its zone."""
        return short(self.message.name)

    def power_off(self) -> None:
        """Deletes its machines."""
        for machine in self.machines:
            machine.delete()
        self.machines, self.message.network_endpoints = [], []


@dataclass(kw_only=True)
class Queued:
    """A request in the queue, with its nodes."""

    message: tpu_v2.QueuedResource
    zone: str
    nodes: list[Node]
    expires: float | None
    pace: Pace = field(default_factory=Pace)
    gone_at: float | None = None

    @property
    def state(self) -> tpu_v2.QueuedResourceState.State:
        """Its state."""
        return self.message.state.state

    def become(self, state: tpu_v2.QueuedResourceState.State, error: str = "") -> None:
        """Takes another state, and the data that belongs to it."""
        data: Json = {"state": state, f"{state.name.lower()}_data": {}}
        if state is States.WAITING_FOR_RESOURCES:
            data = {"state": state}
        if state in (States.SUSPENDING, States.SUSPENDED):
            data["state_initiator"] = "SERVICE"
        if error:
            data["failed_data"] = {"error": {"code": 8, "message": error}}
        self.message.state = tpu_v2.QueuedResourceState(data)


def bad(message: str) -> Refused:
    """Returns a refusal in the words of the service."""
    return invalid(f"Cloud TPU received a bad request. {message}")


def no_location(project: str, zone: str) -> Refused:
    """Returns the refusal of a zone that does not exist, which the service words like one that is forbidden."""
    metadata = {"consumer": f"projects/{project}", "location": zone, "service": "tpu.googleapis.com"}
    details = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "LOCATION_POLICY_VIOLATED"}
    details |= {"domain": "googleapis.com", "metadata": metadata}
    message = f"Permission denied on 'locations/{zone}' (or it may not exist)."
    return Refused(403, "PERMISSION_DENIED", message, details=[details])


def stockout(zone: str) -> str:
    """Returns what the service says if it has no capacity."""
    return (
        f'There is no more capacity in the zone "{zone}"; you can try in another zone where Cloud TPU Nodes are '
        "offered (see https://cloud.google.com/tpu/docs/regions)"
    )


def json_of(asked: Asked, message: Message) -> Json:
    """Returns a message as JSON, with enums as numbers if the request says so, as the official client does."""
    ints = "enum-encoding=int" in asked.query.get("$alt", "")
    return json_format.MessageToDict(message, use_integers_for_enums=ints)


def short(name: str) -> str:
    """Returns the last part of a full name."""
    return name.rpartition("/")[2]


def check_id(name: str, value: str) -> None:
    """Refuses what is no name of a resource."""
    if not NAME.fullmatch(value):
        raise bad(f"{name} {value!r} must match [a-z]([-a-z0-9]*[a-z0-9])? and have at most 63 characters")


def node_ids(spec: tpu_v2.QueuedResource.Tpu.NodeSpec, queued_id: str) -> list[str]:
    """Returns the names of the nodes that a specification asks for."""
    if "multislice_params" not in spec:
        return [spec.node_id or queued_id]
    if spec.multislice_params.node_count < 2:
        raise bad("multislice_params.node_count must be greater than 1")
    prefix = spec.multislice_params.node_id_prefix or queued_id
    return [f"{prefix}-{number}" for number in range(spec.multislice_params.node_count)]


def new_node(spec: tpu_v2.Node, *, parent: str, node_id: str, spot: bool, queued: str, siblings: int) -> Node:
    """Returns the node of a specification that the service accepts."""
    check_id("node_id", node_id)
    zone = short(parent)
    config = spec.accelerator_config
    if bool(spec.accelerator_type) == bool(config.topology):
        raise bad("exactly one of accelerator_type and accelerator_config must be set")
    name = spec.accelerator_type or f"{config.type_.name}:{config.topology}"
    wanted = catalog.accelerator_type(name) or catalog.accelerator_config(config.type_.name, config.topology)
    if wanted is None or wanted.chip not in catalog.ZONES[zone]:
        raise bad(
            f'The requested accelerator configuration for accelerator type, "{name}", could not be found in the zonal '
            f'accelerator configurations for "{zone}".; the accelerator {name} was not found in zone {zone}'
        )
    if not spec.runtime_version:
        raise bad("runtime_version must be set")
    if spec.runtime_version not in catalog.RUNTIME_VERSIONS:
        raise bad(f"the runtime version {spec.runtime_version} was not found in zone {zone}")
    if "network_config" in spec and spec.network_configs:
        raise bad("network_config and network_configs are mutually exclusive")
    if len(spec.description) > 512:
        raise bad("description may have 512 characters")
    answers.check_labels(spec.labels)
    answers.check_metadata(spec.metadata)
    message = tpu_v2.Node(spec)
    message.name, message.state, message.queued_resource = f"{parent}/nodes/{node_id}", NodeStates.CREATING, queued
    message.multislice_node, message.api_version = siblings > 1, tpu_v2.Node.ApiVersion.V2
    tpu_v2.Node.pb(message).create_time.GetCurrentTime()
    return Node(message=message, zone=zone, slice=wanted, spot=spot)


def boot(node: Node, cloud: "Cloud", index: int = 0, num_slices: int = 1) -> None:
    """Makes the machines of a node, which is READY then."""
    account = node.message.service_account
    public = node.message.network_config.enable_external_ips
    env = f"ACCELERATOR_TYPE: '{node.message.accelerator_type}'\n"
    if num_slices > 1:
        env += f"MEGASCALE_NUM_SLICES: '{num_slices}'\nMEGASCALE_SLICE_ID: '{index}'\n"
    for worker in range(node.slice.num_hosts):
        name = f"t1v-n-{node.id}-w-{worker}"
        attributes = dict(node.message.metadata) | {"agent-worker-number": str(worker), "tpu-env": env}
        attributes |= {"accelerator-type": node.message.accelerator_type}
        machine = cloud.machines.boot(name, attributes=attributes, zone=node.zone, preemptible=node.spot)
        scopes = list(account.scope) or [_CLOUD_PLATFORM]
        cloud.give_token(machine, account.email or cloud.service_account, scopes)
        node.machines.append(machine)
        access = {"external_ip": cloud.external(machine.address)} if public else None
        node.message.network_endpoints.append(
            tpu_v2.NetworkEndpoint(ip_address=machine.address, port=8470, access_config=access)
        )
    workers = ",".join(f"unknown:unknown:{machine.address}" for machine in node.machines)
    for machine in node.machines:
        machine.set("attributes/worker-network-endpoints", workers)
    node.message.state, node.message.health = NodeStates.READY, tpu_v2.Node.Health.HEALTHY


def check_quota(nodes: list[Node], existing: list[Node], quota: dict[str, int]) -> None:
    """Refuses more chips than the project may have in a zone."""
    for chip in {node.slice.chip for node in nodes} & set(quota):
        used = sum(node.slice.chips for node in existing if node.slice.chip == chip and node.zone == nodes[0].zone)
        if used + sum(node.slice.chips for node in nodes if node.slice.chip == chip) > quota[chip]:
            tier = "Preemptible" if nodes[0].spot else ""
            raise Refused(
                429,
                "RESOURCE_EXHAUSTED",
                f"Quota limit 'TPU{chip.upper()}{tier}PerProjectPerZoneForTPUAPI' has been exceeded. "
                f"Limit: {quota[chip]} in zone {nodes[0].zone}.",
            )


def check_reservation(name: str, parent: str, known: set[str]) -> None:
    """Refuses a reservation that is not there."""
    if not name.startswith(f"{parent}/reservations/"):
        raise bad_field("reservation_name", name, f"Expected {parent}/reservations/NAME.")
    if short(name) not in known:
        raise answers.not_found(name)
