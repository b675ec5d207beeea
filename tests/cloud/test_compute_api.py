"""Compute Engine of the pretended cloud, as the official clients of Google see it."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import compute_v1

from tests.cloud.machines import PaperMachine, PaperMachines
from tests.cloud.server import Cloud
from tests.cloud.test_apis import FULL_SCOPE, ZONE, refused
from tests.cloud.test_apis import cloud as cloud

REGION = "us-east5"
PROJECT: dict[str, Any] = {"project": "test-project"}


class Compute:
    """The clients of Compute Engine, and a group of four machines with v6e:4x4."""

    def __init__(self, endpoint: str) -> None:
        options: Any = {"credentials": AnonymousCredentials(), "client_options": {"api_endpoint": endpoint}}
        self.templates: Any = compute_v1.InstanceTemplatesClient(**options)
        self.groups: Any = compute_v1.InstanceGroupManagersClient(**options)
        self.policies: Any = compute_v1.ResourcePoliciesClient(**options)
        self.instances: Any = compute_v1.InstancesClient(**options)
        self.operations: Any = compute_v1.GlobalOperationsClient(**options)
        self.at: dict[str, Any] = PROJECT | {"zone": ZONE}

    def template(self, **scheduling: Any) -> dict[str, Any]:
        scheduling = {"provisioning_model": "SPOT", "instance_termination_action": "DELETE"} | scheduling
        image = {"source_image": "projects/p/global/images/family/f", "disk_type": "hyperdisk-balanced"}
        properties = {
            "machine_type": "ct6e-standard-4t",
            "disks": [{"boot": True, "initialize_params": image}],
            "network_interfaces": [{"network": "global/networks/default", "access_configs": [{}]}],
            "scheduling": {"on_host_maintenance": "TERMINATE"} | scheduling,
            "labels": {"jaxinfra": "1"},
            "metadata": {"items": [{"key": "ssh-keys", "value": "me:ssh-ed25519 AAAAC3 me@here"}]},
            "service_accounts": [{"email": "default", "scopes": [FULL_SCOPE]}],
        }
        return PROJECT | {"instance_template_resource": {"name": "run", "properties": properties}}

    def policy(self, **fields: Any) -> dict[str, Any]:
        workload = {"type_": "HIGH_THROUGHPUT", "accelerator_topology": "4x4"} | fields
        return PROJECT | {"region": REGION, "resource_policy_resource": {"name": "run", "workload_policy": workload}}

    def group(self, **fields: Any) -> dict[str, Any]:
        group = {"name": "run", "instance_template": "global/instanceTemplates/run", "target_size": 4}
        group |= {"target_size_policy": {"mode": "BULK"}}
        policy = f"projects/test-project/regions/{REGION}/resourcePolicies/run"
        group |= {"resource_policies": {"workload_policy": policy}}
        return self.at | {"instance_group_manager_resource": group | fields}

    def make(self, **fields: Any) -> None:
        self.templates.insert(self.template()).result()
        self.policies.insert(self.policy()).result()
        self.groups.insert(self.group(**fields)).result()

    def managed(self) -> list[Any]:
        return list(self.groups.list_managed_instances(instance_group_manager="run", **self.at))

    def states(self) -> list[str]:
        """The states of the first instance, read after read, each once."""
        seen: list[str] = []
        for _ in range(12):
            first = self.managed()[0]
            seen += [state] if (state := first.instance_status or first.current_action) not in seen[-1:] else []
        return seen


@pytest.fixture
def compute(cloud: Cloud) -> Compute:
    return Compute(cloud.endpoint)


def test_groups_have_all_instances_or_none(cloud: Cloud, compute: Compute) -> None:
    cloud.stockout(ZONE, times=3)
    compute.make()
    assert compute.states() == ["CREATING", "PROVISIONING", "STAGING", "RUNNING"]
    errors = compute.groups.list_errors(instance_group_manager="run", **compute.at)
    assert [each.error.code for each in errors] == ["ZONE_RESOURCE_POOL_EXHAUSTED"] * 12
    group = compute.groups.get(instance_group_manager="run", **compute.at)
    assert group.status.is_stable and group.current_actions.none == 4
    listed = list(compute.instances.list(**compute.at))
    assert [each.network_interfaces[0].network_i_p for each in listed] == [f"10.0.0.{n}" for n in range(1, 5)]
    labeled = {"filter": "labels.jaxinfra=1"}
    (found,) = [part.instances for _, part in compute.instances.aggregated_list(PROJECT | labeled) if part.instances]
    assert len(found) == 4
    assert not list(compute.instances.list(compute.at | {"filter": "labels.jaxinfra=2"}))
    refused(
        exceptions.BadRequest, lambda: compute.templates.delete(instance_template="run", **PROJECT), "already being"
    )
    compute.groups.delete(instance_group_manager="run", **compute.at).result()
    compute.templates.delete(instance_template="run", **PROJECT).result()
    compute.policies.delete(resource_policy="run", region=REGION, **PROJECT).result()
    assert not cloud.remaining() and not cloud.hosts()


@pytest.mark.parametrize("repairs", [True, False])
def test_a_group_makes_preempted_instances_again(cloud: Cloud, compute: Compute, repairs: bool) -> None:
    compute.make(instance_lifecycle_policy={} if repairs else {"default_action_on_failure": "DO_NOTHING"})
    compute.states()
    before = {each.name: each.id for each in compute.managed()}
    cloud.preempt("run", after_s=0)
    after = compute.states()
    assert after == (
        ["STOPPING", "RECREATING", "PROVISIONING", "STAGING", "RUNNING"] if repairs else ["STOPPING", "NONE"]
    )
    assert {each.name for each in compute.managed()} == set(before)
    assert not {each.id for each in compute.managed()} & set(before.values())


def test_names_zones_rights_and_quota_of_machines(cloud: Cloud, compute: Compute) -> None:
    cloud.deny("compute.instanceGroupManagers.create")
    refused(exceptions.Forbidden, compute.make, "compute.instanceGroupManagers.create")
    cloud.allow("compute.instanceGroupManagers.create")
    refused(exceptions.Conflict, lambda: compute.templates.insert(compute.template()), "instanceTemplates/run")
    refused(exceptions.BadRequest, lambda: compute.groups.insert(compute.group() | {"zone": "mars-1"}), "mars-1")
    refused(exceptions.BadRequest, lambda: compute.groups.insert(compute.group(target_size=3)), "gang size")
    elsewhere = compute.group() | {"zone": "us-central1-c"}
    refused(exceptions.BadRequest, lambda: compute.groups.insert(elsewhere), "ct6e-standard-4t", "us-central1-c")
    missing = compute.group(instance_template="global/instanceTemplates/none")
    refused(exceptions.NotFound, lambda: compute.groups.insert(missing), "instanceTemplates/none")
    cloud.quota["v6e"] = 8
    compute.groups.insert(compute.group())
    assert compute.states() == ["CREATING"]
    errors = list(compute.groups.list_errors(instance_group_manager="run", **compute.at))
    assert errors[0].error.code == "QUOTA_EXCEEDED" and "8.0" in errors[0].error.message
    cloud.quota.clear()
    assert compute.states()[-1] == "RUNNING"


def test_wrong_templates_and_policies_are_refused(compute: Compute) -> None:
    for scheduling, word in (
        ({"on_host_maintenance": "MIGRATE"}, "migration"),
        ({"automatic_restart": True}, "automaticRestart"),
        ({"provisioning_model": "STANDARD"}, "termination action"),
        ({"max_run_duration": {"seconds": 5}}, "maxRunDuration"),
    ):
        request = compute.template(**scheduling)
        refused(exceptions.BadRequest, lambda request=request: compute.templates.insert(request), word)
    request = compute.template()
    request["instance_template_resource"]["properties"]["disks"][0]["initialize_params"]["disk_type"] = "pd-balanced"
    refused(exceptions.BadRequest, lambda: compute.templates.insert(request), "pd-balanced", "not compatible")
    wrong = compute.policy(type_="HIGH_AVAILABILITY")
    refused(exceptions.BadRequest, lambda: compute.policies.insert(wrong), "acceleratorTopology")


def test_single_machines_take_keys_with_the_fingerprint(cloud: Cloud, compute: Compute) -> None:
    instance = {"name": "mine", "machine_type": f"zones/{ZONE}/machineTypes/n2-standard-8"}
    instance |= {"network_interfaces": [{"network": "global/networks/default"}]}
    image = {"source_image": "projects/p/global/images/family/f"}
    instance |= {"disks": [{"boot": True, "initialize_params": image}]}
    compute.instances.insert(compute.at | {"instance_resource": instance}).result()
    statuses = [compute.instances.get(instance="mine", **compute.at).status for _ in range(3)]
    assert statuses == ["PROVISIONING", "STAGING", "RUNNING"]
    metadata = {"items": [{"key": "ssh-keys", "value": "me:key"}]}
    request = compute.at | {"instance": "mine", "metadata_resource": metadata}
    refused(exceptions.PreconditionFailed, lambda: compute.instances.set_metadata(request), "fingerprint")
    metadata["fingerprint"] = compute.instances.get(instance="mine", **compute.at).metadata.fingerprint
    compute.instances.set_metadata(compute.at | {"instance": "mine", "metadata_resource": metadata}).result()
    (host,) = cloud.hosts()
    assert isinstance(host, PaperMachine) and host.metadata["attributes/ssh-keys"] == "me:key"
    cloud.maintenance("mine", datetime(2030, 1, 2, tzinfo=UTC))
    status = compute.instances.get(instance="mine", **compute.at).resource_status
    assert status.upcoming_maintenance.window_start_time == "2030-01-02T00:00:00+00:00"
    compute.instances.delete(instance="mine", **compute.at).result()
    assert not cloud.remaining() and not cloud.hosts()


def test_states_last_as_long_as_the_test_says() -> None:
    with Cloud(PaperMachines(), delay_s=0.2) as cloud:
        compute = Compute(cloud.endpoint)
        # `done` and `result` of what the client returns would ask compute.googleapis.com, whatever its endpoint is.
        name = compute.templates.insert(compute.template()).name
        statuses = [compute.operations.get(operation=name, **PROJECT).status.name]
        while statuses[-1] != "DONE":
            statuses.append(compute.operations.get(operation=name, **PROJECT).status.name)
        assert "RUNNING" in statuses
        assert cloud.remaining() == ["instance template global/run"]
