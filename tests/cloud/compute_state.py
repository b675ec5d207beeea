"""What the Compute Engine of tests keeps: groups and their instances, with their states and the rules of templates."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.cloud import compute_v1

from tests.cloud import answers, catalog
from tests.cloud.answers import NAME, Json, Pace, bad_field, invalid
from tests.cloud.machines import Machine

if TYPE_CHECKING:
    from tests.cloud.server import Cloud

_HYPERDISK_ONLY = ("ct6e-", "tpu7x-", "a3-ultragpu-", "a4-")
_RESERVATION_KEY = "compute.googleapis.com/reservation-name"


@dataclass(kw_only=True)
class Instance:
    """A virtual machine, or the place of one in a group that has none yet."""

    name: str
    zone: str
    properties: compute_v1.InstanceProperties
    created_by: str = ""  # the group
    message: compute_v1.Instance | None = None  # None while it does not exist
    machine: Machine | None = None
    action: str = "CREATING"  # of its group
    errors: list[Json] = field(default_factory=list)  # of the last try to make it
    upcoming: Json | None = None  # maintenance
    pace: Pace = field(default_factory=Pace)

    @property
    def status(self) -> str:
        """Its status, "" if it does not exist."""
        return self.message.status if self.message is not None else ""

    @property
    def is_spot(self) -> bool:
        """Whether it may be preempted."""
        return self.properties.scheduling.provisioning_model == "SPOT" or self.properties.scheduling.preemptible

    @property
    def chips(self) -> tuple[str, int]:
        """The kind and number of its accelerators."""
        return catalog.machine_type(self.zone, self.properties.machine_type) or ("", 0)

    def power_off(self) -> None:
        """Deletes it."""
        if self.machine is not None:
            self.machine.delete()
        self.machine = self.message = None

    @property
    def is_lost(self) -> bool:
        """Whether it does not exist, or has ended."""
        return self.status in ("", "TERMINATED")

    def advance(self, cloud: "Cloud") -> None:
        """Takes the next state of an instance that exists."""
        assert self.message is not None
        if self.message.status == "PROVISIONING":
            self.message.status = "STAGING"
        elif self.message.status == "STAGING":
            self._boot(cloud)
            self.message.status, self.action = "RUNNING", "NONE"
        elif self.message.status == "STOPPING" and (self.machine is None or not self.machine.is_running):
            if self.properties.scheduling.instance_termination_action == "DELETE":
                self.power_off()
            else:
                self.message.status = "TERMINATED"

    def provision(self, base: str, number: int) -> None:
        """Comes into existence."""
        self.power_off()
        names = ("description", "scheduling", "service_accounts", "tags", "labels", "disks", "reservation_affinity")
        message = compute_v1.Instance({key: getattr(self.properties, key) for key in names if key in self.properties})
        for key in ("service_accounts", "disks", "network_interfaces"):
            setattr(message, key, getattr(self.properties, key))
        message.labels = dict(self.properties.labels)
        message.metadata = compute_v1.Metadata(self.properties.metadata)
        if self.created_by:
            message.metadata.items.append(compute_v1.Items(key="created-by", value=self.created_by))
        message.metadata.fingerprint = fingerprint(message.metadata)
        message.name, message.id, message.kind = self.name, number, "compute#instance"
        message.zone = f"{base}/zones/{self.zone}"
        message.machine_type = f"{message.zone}/machineTypes/{self.properties.machine_type}"
        message.self_link, message.creation_timestamp = f"{message.zone}/instances/{self.name}", answers.now()
        message.status = "PROVISIONING"
        self.message, self.action, self.errors, self.pace = message, "CREATING", [], Pace()

    def _boot(self, cloud: "Cloud") -> None:
        assert self.message is not None
        attributes = {item.key: item.value for item in self.message.metadata.items}
        self.machine = cloud.machines.boot(self.name, attributes=attributes, zone=self.zone, preemptible=self.is_spot)
        for account in self.properties.service_accounts:
            email = cloud.service_account if account.email == "default" else account.email
            cloud.give_token(self.machine, email, list(account.scopes))
        for interface in self.message.network_interfaces[:1]:
            interface.network_i_p = self.machine.address
            for access in interface.access_configs:
                access.nat_i_p = cloud.external(self.machine.address)

    def preempt(self, after_s: float) -> None:
        """Gives the notice, and stops."""
        if not self.is_spot:
            raise ValueError(f"{self.name}: expected Spot capacity: no other is preempted")
        assert self.message is not None and self.machine is not None
        self.machine.preempt(after_s)
        self.message.status, self.pace = "STOPPING", Pace()

    def plan_maintenance(self, upcoming: Json) -> None:
        """Tells of planned maintenance."""
        assert self.message is not None and self.machine is not None
        self.upcoming = upcoming
        self.machine.set("upcoming-maintenance", json.dumps(answers.in_metadata(upcoming)))

    def show(self) -> Json:
        """Returns it as the API does."""
        assert self.message is not None
        shown = answers.render(compute_v1.Instance.pb(self.message))
        return shown | ({"resourceStatus": {"upcomingMaintenance": self.upcoming}} if self.upcoming else {})

    def show_managed(self, base: str) -> Json:
        """Returns it as the list of a group does."""
        link = f"{base}/zones/{self.zone}/instances/{self.name}"
        shown: Json = {"name": self.name, "instance": link, "currentAction": self.action}
        if self.message is not None:
            shown |= {"instanceStatus": self.status, "id": str(self.message.id)}
        return shown | ({"lastAttempt": {"errors": {"errors": self.errors}}} if self.errors else {})


@dataclass(kw_only=True)
class Group:
    """A managed instance group of a zone."""

    message: compute_v1.InstanceGroupManager
    zone: str
    template: str  # its full name
    policy: str  # likewise; "" if it has none
    instances: list[Instance]
    errors: list[Json] = field(default_factory=list)  # all since it exists
    last_check: Json | None = None  # what a try to make all instances found
    gone_at: float | None = None

    @property
    def name(self) -> str:
        """Its name."""
        return self.message.name

    @property
    def is_bulk(self) -> bool:
        """Whether all instances are made together, or none."""
        return self.message.target_size_policy.mode == "BULK"

    @property
    def repairs(self) -> bool:
        """Whether it makes instances again that are lost."""
        return self.message.instance_lifecycle_policy.default_action_on_failure != "DO_NOTHING"

    def failed(self, tried: list[Instance], error: Json) -> None:
        """Notes that instances could not be made."""
        self.last_check = {"error": {"errors": [error]}, "timestamp": answers.now()} if self.is_bulk else None
        for instance in tried:
            instance.errors = [error]
            details = {"action": instance.action, "instance": instance.name}
            self.errors.append({"error": error, "instanceActionDetails": details, "timestamp": answers.now()})

    def show(self) -> Json:
        """Returns it as the API does."""
        actions = Counter(instance.action for instance in self.instances)
        words = {action: re.sub("_(.)", lambda letter: letter[1].upper(), action.lower()) for action in actions}
        status: Json = {"isStable": actions["NONE"] == len(self.instances)}
        if self.is_bulk:
            status["bulkInstanceOperation"] = {"inProgress": not status["isStable"]}
            status["bulkInstanceOperation"] |= {"lastProgressCheck": self.last_check} if self.last_check else {}
        shown = answers.render(compute_v1.InstanceGroupManager.pb(self.message))
        return shown | {"currentActions": {words[each]: n for each, n in actions.items()}, "status": status}


def fingerprint(metadata: compute_v1.Metadata) -> str:
    """Returns the fingerprint of metadata, which a change has to name."""
    text = json.dumps([(item.key, item.value) for item in metadata.items])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def instance_names(base: str, group: str, size: int) -> list[str]:
    """Returns names of instances, which are not in order, as those of the real service, but the same in every run."""
    return [f"{base}-{hashlib.sha256(f'{group}/{number}'.encode()).hexdigest()[:4]}" for number in range(size)]


def stockout(zone: str, project: str) -> Json:
    """Returns the error of a zone without capacity."""
    message = f"The zone 'projects/{project}/zones/{zone}' does not have enough resources available to fulfill the "
    return {"code": "ZONE_RESOURCE_POOL_EXHAUSTED", "message": message + "request. Try a different zone, or later."}


def over_quota(chip: str, limit: int, zone: str, *, spot: bool) -> Json:
    """Returns the error of a project that has used up its quota."""
    metric = f"{'PREEMPTIBLE_' if spot else ''}{chip.upper()}"
    message = f"Quota '{metric}' exceeded. Limit: {float(limit)} in region {region_of(zone)}."
    return {"code": "QUOTA_EXCEEDED", "message": message}


def region_of(zone: str) -> str:
    """Returns the region of a zone."""
    return zone.rpartition("-")[0]


def check_name(name: str) -> None:
    """Refuses what is no name."""
    if not NAME.fullmatch(name):
        why = f"Must be a match of regex '{NAME.pattern}'"
        raise bad_field("resource.name", name, why)


def check_policy(policy: compute_v1.ResourcePolicy) -> None:
    """Refuses a workload policy that the service would."""
    check_name(policy.name)
    if "workload_policy" not in policy:
        raise invalid("Required field 'resource.workloadPolicy' not specified")
    workload = policy.workload_policy
    if not workload.type_:
        raise invalid("Required field 'resource.workloadPolicy.type' not specified")
    if topology := workload.accelerator_topology:
        where = "resource.workloadPolicy.acceleratorTopology"
        if not re.fullmatch(r"\d+(x\d+){1,2}", topology):
            raise bad_field(where, topology, "Expected sizes such as 4x4.")
        if workload.type_ != "HIGH_THROUGHPUT" or workload.max_topology_distance:
            raise bad_field(where, topology, "It needs type HIGH_THROUGHPUT, and no maxTopologyDistance.")


def check_properties(properties: compute_v1.InstanceProperties, reservations: set[str]) -> None:
    """Refuses properties of instances that the service would."""
    where, kind = "resource.properties", properties.machine_type
    if not kind or "/" in kind:
        raise bad_field(f"{where}.machineType", kind, "Expected the name of a machine type.")
    if sum(disk.boot for disk in properties.disks) != 1:
        raise invalid(f"Invalid value for field '{where}.disks': expected one boot disk.")
    for disk in properties.disks:
        given = disk.initialize_params
        if disk.boot and not re.fullmatch(r"(.*/)?(projects/[^/]+/)?global/images/.+", given.source_image):
            raise bad_field(f"{where}.disks[0].initializeParams.sourceImage", given.source_image, "No such image.")
        disk_type = given.disk_type or "pd-standard"
        if "/" in disk_type:
            raise bad_field(f"{where}.disks[0].initializeParams.diskType", disk_type, "Expected a name.")
        if kind.startswith(_HYPERDISK_ONLY) and not disk_type.startswith("hyperdisk-"):
            raise invalid(f"[{disk_type}, {kind}] features are not compatible for creating instance.")
    if not properties.network_interfaces:
        raise invalid(f"Invalid value for field '{where}.networkInterfaces': at least one is required.")
    _check_scheduling(properties, where)
    for account in properties.service_accounts:
        if not account.email or not account.scopes:
            raise bad_field(f"{where}.serviceAccounts", account.email, "Email and scopes are required.")
    affinity = properties.reservation_affinity
    if affinity.consume_reservation_type == "SPECIFIC_RESERVATION":
        if affinity.key != _RESERVATION_KEY or len(affinity.values) != 1:
            raise bad_field(f"{where}.reservationAffinity", affinity.key, f"Expected {_RESERVATION_KEY} and a value.")
        if affinity.values[0].rpartition("/")[2] not in reservations:
            raise answers.not_found(affinity.values[0])
        if properties.scheduling.provisioning_model == "SPOT":
            raise invalid("Reservation affinity is not supported for the SPOT provisioning model.")
    answers.check_labels(properties.labels)
    answers.check_metadata({item.key: item.value for item in properties.metadata.items})


def _check_scheduling(properties: compute_v1.InstanceProperties, where: str) -> None:
    """Refuses scheduling options that contradict one another."""
    scheduling = properties.scheduling
    is_spot = scheduling.provisioning_model == "SPOT"
    if catalog.has_accelerator(properties.machine_type) and scheduling.on_host_maintenance != "TERMINATE":
        raise invalid("Instances with guest accelerators do not support live migration.")
    if is_spot and scheduling.automatic_restart:
        raise bad_field(f"{where}.scheduling.automaticRestart", "true", "Spot instances cannot restart.")
    is_limited = "max_run_duration" in scheduling
    if scheduling.instance_termination_action and not (is_spot or is_limited):
        raise invalid("You cannot specify a termination action for a VM instance of the standard provisioning model.")
    if is_limited:
        if not scheduling.instance_termination_action:
            raise invalid("A termination action is required with maxRunDuration.")
        if not 30 <= scheduling.max_run_duration.seconds <= 120 * 86400:
            raise bad_field(f"{where}.scheduling.maxRunDuration", scheduling.max_run_duration.seconds, "Out of range.")


def check_group(group: compute_v1.InstanceGroupManager, zone: str, kind: str, topology: str) -> None:
    """Refuses a group that the service would: of this machine type, with this topology of its policy."""
    check_name(group.name)
    if "target_size" not in group:
        raise invalid("Required field 'resource.targetSize' not specified")
    found = catalog.machine_type(zone, kind)
    if found is None:
        raise bad_field("resource.instanceTemplate", kind, f"Machine type does not exist in zone '{zone}'.")
    if topology and found[1]:
        size = math.prod(map(int, topology.split("x"))) // found[1]
        if group.target_size not in (0, size):
            raise bad_field(
                "resource.targetSize",
                group.target_size,
                f"Requested invalid target size '{group.target_size}' for a Managed Instance Group in the gang mode of "
                f"size '{size}'. Should be equal to the gang size.",
            )


def matches(item: Json, condition: str) -> bool:
    """Whether an item fits a filter such as `labels.a=b AND name:run-*`."""
    for part in re.split(r"\s+AND\s+", condition.strip()) if condition.strip() else []:
        match = re.fullmatch(r"\(?\s*([\w.\-]+)\s*(!=|=|:|\beq\b|\bne\b)\s*\"?([^\"()]*?)\"?\s*\)?", part)
        if match is None:
            raise bad_field("filter", condition, "Invalid list filter expression.")
        value: object = item
        for key in match[1].split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        pattern = ".*" if match[3] == "*" else re.escape(match[3]).replace(r"\*", ".*")
        pattern = match[3] if match[2] in ("eq", "ne") else f".*{pattern}.*" if match[2] == ":" else pattern
        if (value is not None and re.fullmatch(pattern, str(value)) is not None) == (match[2] in ("!=", "ne")):
            return False
    return True
