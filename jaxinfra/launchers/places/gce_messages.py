"""The messages that ask Compute Engine for slices: a workload policy, an instance template, and groups of machines."""

import re
from collections.abc import Mapping
from typing import Any

from jaxinfra.launchers.places.google_cloud import BY_KEYS, INSTALL, SCOPE, SSH_KEYS
from jaxinfra.launchers.places.images import Machines
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.packages import import_optional

DISK_GB = 200


def compute_module() -> Any:
    """Imports the client's package, which takes seconds."""
    return import_optional("google.cloud.compute_v1", needed_by="--place gce", install=INSTALL)


def region_of(zone: str) -> str:
    """Returns the region of a zone."""
    return zone.rpartition("-")[0]


def needs_policy(machines: Machines) -> bool:
    """Whether the hosts of a slice are to be placed together."""
    return machines.hosts > 1 and machines.type.has_policy


def policy_message(options: PlaceOptions, machines: Machines, description: str) -> Any:
    """Returns the policy that connects the hosts of a slice."""
    workload: dict[str, Any] = {"type_": "HIGH_THROUGHPUT"}
    if machines.topology:
        workload["accelerator_topology"] = machines.topology
    return compute_module().ResourcePolicy(name=options.name, description=description, workload_policy=workload)


def template_message(
    options: PlaceOptions, machines: Machines, description: str, labels: Mapping[str, str], key_line: str
) -> Any:
    """Returns what each machine is."""
    path = f"projects/{options.project}"
    interface: dict[str, Any] = {"nic_type": "GVNIC"}
    if "subnetworks/" in options.network:
        interface["subnetwork"] = options.network
    else:
        is_path = "/" in options.network
        interface["network"] = options.network if is_path else f"{path}/global/networks/{options.network or 'default'}"
    if not options.internal_ips:
        interface["access_configs"] = [{"name": "External NAT", "type_": "ONE_TO_ONE_NAT"}]
    image = options.image or machines.type.image
    disk = {
        "source_image": image if "/" in image else f"{path}/global/images/{image}",
        "disk_type": machines.type.disk_type,
        "disk_size_gb": DISK_GB,
    }
    properties: dict[str, Any] = {
        "description": description,
        "machine_type": machines.machine,
        "disks": [{"boot": True, "auto_delete": True, "initialize_params": disk}],
        "network_interfaces": [interface],
        "scheduling": _scheduling(options, machines),
        "service_accounts": [{"email": options.service_account or "default", "scopes": [SCOPE]}],
        "labels": labels,
        "metadata": {"items": [{"key": key, "value": value} for key, value in {**BY_KEYS, SSH_KEYS: key_line}.items()]},
    }
    if options.reservation:
        properties["reservation_affinity"] = {
            "consume_reservation_type": "SPECIFIC_RESERVATION",
            "key": "compute.googleapis.com/reservation-name",
            "values": [options.reservation],
        }
    return compute_module().InstanceTemplate(name=options.name, description=description, properties=properties)


def content_of(template: Any) -> tuple[Any, ...]:
    """Returns what options say of machines; the cloud adds more, and makes URLs of paths. Keys may differ."""
    properties = template.properties
    disk, interface, scheduling = properties.disks[0], properties.network_interfaces[0], properties.scheduling
    paths = (disk.initialize_params.source_image, interface.subnetwork or interface.network)
    return (
        (template.description, properties.machine_type, bool(interface.access_configs)),
        [re.sub(r".*/(?=projects/)", "", path) for path in paths],
        (scheduling.provisioning_model, scheduling.max_run_duration.seconds),
        [*properties.reservation_affinity.values],
        [account.email for account in properties.service_accounts],
    )


def _scheduling(options: PlaceOptions, machines: Machines) -> dict[str, Any]:
    is_bound = bool(options.reservation) and machines.type.reservation_bound
    scheduling: dict[str, Any] = {
        "provisioning_model": "SPOT" if options.spot else "RESERVATION_BOUND" if is_bound else "STANDARD",
        "on_host_maintenance": "TERMINATE",
        "automatic_restart": False,
    }
    if options.max_hours:
        scheduling["max_run_duration"] = {"seconds": round(options.max_hours * 3600)}
    if options.spot or is_bound or options.max_hours:
        scheduling["instance_termination_action"] = "DELETE"
    return scheduling


def group_message(options: PlaceOptions, machines: Machines, description: str, name: str) -> Any:
    """Returns the group of the machines of one slice: all or none are made, and none is repaired."""
    path, region = f"projects/{options.project}", region_of(options.zone)
    group: dict[str, Any] = {
        "name": name,
        "description": description,
        "base_instance_name": name,
        "instance_template": f"{path}/global/instanceTemplates/{options.name}",
        "target_size": machines.hosts,
        "target_size_policy": {"mode": "BULK"},
        "instance_lifecycle_policy": {"default_action_on_failure": "DO_NOTHING"},
    }
    if needs_policy(machines):
        policy = f"{path}/regions/{region}/resourcePolicies/{options.name}"
        group["resource_policies"] = {"workload_policy": policy}
    return compute_module().InstanceGroupManager(group)
