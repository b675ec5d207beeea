"""Cloud TPU of the pretended cloud, as the official client of Google sees it, and what both APIs share."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuRestTransport

from tests.cloud import catalog
from tests.cloud.machines import PaperMachine, PaperMachines
from tests.cloud.server import Cloud

ZONE = "us-east5-b"
PARENT = f"projects/test-project/locations/{ZONE}"
QUEUED = f"{PARENT}/queuedResources/run"
FULL_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    with Cloud(PaperMachines()) as made:
        yield made


@pytest.fixture
def tpu(cloud: Cloud) -> Any:
    address = cloud.endpoint.removeprefix("http://")
    return tpu_v2.TpuClient(
        transport=TpuRestTransport(host=address, url_scheme="http", credentials=AnonymousCredentials())
    )


def queued(count: int = 1, *, spot: bool = True, spec: dict[str, Any] | None = None, **node: Any) -> dict[str, Any]:
    """A request for nodes of two hosts."""
    node = {"accelerator_type": "v6e-8", "runtime_version": "v2-alpha-tpuv6e", "labels": {"jaxinfra": "1"}} | node
    named = {"node_id": "run"} if count == 1 else {"multislice_params": {"node_count": count, "node_id_prefix": "run"}}
    body = {"tpu": {"node_spec": [{"parent": PARENT, "node": node} | named | (spec or {})]}}
    body |= {"spot": {}} if spot else {}
    return {"parent": PARENT, "queued_resource_id": "run", "queued_resource": body}


def states(tpu: Any) -> list[str]:
    """The states of the queued resource, read after read, each once."""
    seen: list[str] = []
    for _ in range(8):
        state = tpu.get_queued_resource(name=QUEUED).state.state.name
        seen += [state] if state not in seen[-1:] else []
    return seen


def refused(kind: type[exceptions.ClientError], act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert not [word for word in words if word not in message], message


def test_queued_resources_wait_are_provisioned_and_deleted(cloud: Cloud, tpu: Any) -> None:
    public = {"network_config": {"enable_external_ips": True}, "metadata": {"a": "b"}}
    made = tpu.create_queued_resource(queued(2, accelerator_type="v6e-16", **public)).result()
    assert made.name == QUEUED and made.state.state.name == "ACCEPTED"
    assert states(tpu) == ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    nodes = list(tpu.list_nodes(parent="projects/test-project/locations/-"))
    assert [node.name.rpartition("/")[2] for node in nodes] == ["run-0", "run-1"]
    assert {node.state.name for node in nodes} == {"READY"} and nodes[0].queued_resource == QUEUED
    addresses = [each.ip_address for node in nodes for each in node.network_endpoints]
    assert addresses == [f"10.0.0.{number}" for number in range(1, 9)]
    assert nodes[0].network_endpoints[0].access_config.external_ip == "10.0.0.1"
    third = cloud.hosts()[2]
    assert isinstance(third, PaperMachine)
    assert third.metadata["attributes/a"] == "b" and third.metadata["attributes/agent-worker-number"] == "2"
    assert third.metadata["attributes/worker-network-endpoints"].endswith(":10.0.0.4")
    delete = tpu_v2.DeleteQueuedResourceRequest(name=QUEUED)
    refused(exceptions.BadRequest, lambda: tpu.delete_queued_resource(delete), "ACTIVE", "force")
    assert len(cloud.remaining()) == 3
    tpu.delete_queued_resource(tpu_v2.DeleteQueuedResourceRequest(name=QUEUED, force=True))
    assert not cloud.remaining() and not cloud.hosts()
    refused(exceptions.NotFound, lambda: tpu.get_queued_resource(name=QUEUED), QUEUED)


def test_spot_nodes_are_preempted_and_their_hosts_get_the_notice(cloud: Cloud, tpu: Any) -> None:
    tpu.create_queued_resource(queued())
    states(tpu)
    (host,) = cloud.hosts()
    cloud.preempt("run")
    assert isinstance(host, PaperMachine) and host.metadata["preempted"] == "TRUE" and not host.is_running
    assert tpu.get_node(name=f"{PARENT}/nodes/run").state.name == "PREEMPTED"
    assert states(tpu)[-1] == "SUSPENDED"
    assert cloud.remaining() == [f"node {ZONE}/run PREEMPTED", f"queued resource {ZONE}/run SUSPENDED"]
    tpu.delete_queued_resource(name=QUEUED)
    assert not cloud.remaining()
    tpu.create_queued_resource(queued(spot=False))
    states(tpu)
    with pytest.raises(ValueError, match="Spot"):
        cloud.preempt("run")


def test_a_stockout_keeps_the_queue_waiting(cloud: Cloud, tpu: Any) -> None:
    cloud.stockout(ZONE, times=10**6)
    tpu.create_queued_resource(queued())
    assert states(tpu)[-1] == "WAITING_FOR_RESOURCES"
    cloud.stockout(ZONE, times=2)
    assert states(tpu) == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    tpu.delete_queued_resource(tpu_v2.DeleteQueuedResourceRequest(name=QUEUED, force=True))
    cloud.stockout(ZONE, times=10**6)
    request = queued()
    request["queued_resource"]["queueing_policy"] = {"valid_until_duration": {"seconds": 0}}
    tpu.create_queued_resource(request)
    assert states(tpu)[-1] == "FAILED"
    assert tpu.get_queued_resource(name=QUEUED).state.failed_data.error.code == 8


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (queued(accelerator_type="v6e-12345"), "v6e-12345 not found us-east5-b"),
        (queued(accelerator_type="v5p-8"), "v5p-8 not found us-east5-b"),
        (queued(runtime_version="v7"), "v7 runtime"),
        (queued(runtime_version=""), "runtime_version"),
        (queued(labels={"Upper": "1"}), "Upper"),
        (queued(labels={"run": "a/b"}), "a/b"),
        (queued(metadata={"a b": "1"}), "a b"),
        (queued(spec={"node_id": "Run_1"}), "Run_1"),
        (queued(spec={"node_id": "a" * 64}), "node_id 63"),
        (queued(spec={"parent": "projects/test-project/locations/us-east1-d"}), "parent"),
        (queued(accelerator_config={"type_": "V6E", "topology": "2x4"}), "accelerator_config"),
        (queued() | {"queued_resource_id": "Run"}, "queued_resource_id"),
        (queued(2, spec={"multislice_params": {"node_count": 1}}), "node_count"),
    ],
)
def test_wrong_queued_resources_are_refused(tpu: Any, request_: dict[str, Any], words: str) -> None:
    refused(exceptions.BadRequest, lambda: tpu.create_queued_resource(request_), *words.split())


def test_names_zones_rights_and_quota_of_tpus(cloud: Cloud, tpu: Any) -> None:
    def create() -> None:
        tpu.create_queued_resource(queued())

    cloud.deny("tpu.nodes.create")
    refused(exceptions.Forbidden, create, "tpu.nodes.create")
    cloud.allow("tpu.nodes.create")
    cloud.quota["v6e"] = 4
    refused(exceptions.TooManyRequests, create, "Quota", "V6E", "Limit: 4", ZONE)
    cloud.quota.clear()
    create()
    refused(exceptions.Conflict, create, QUEUED)
    elsewhere = PARENT.replace(ZONE, "mars-1")
    refused(exceptions.Forbidden, lambda: list(tpu.list_nodes(parent=elsewhere)), "locations/mars-1")
    other = "projects/other/locations/-"
    refused(exceptions.Forbidden, lambda: list(tpu.list_nodes(parent=other)), "other")
    found = [each.type_ for each in tpu.list_accelerator_types(parent=PARENT)]
    assert found[0] == "v6e-1" and found[-1] == "v6e-256"
    assert "v2-alpha-tpuv6e" in [each.version for each in tpu.list_runtime_versions(parent=PARENT)]


def test_unknown_fields_and_values_are_refused(cloud: Cloud) -> None:
    def post(path: str, body: Any) -> tuple[int, str]:
        request = urllib.request.Request(f"{cloud.endpoint}{path}", json.dumps(body).encode(), method="POST")
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=10)
        return caught.value.code, json.loads(caught.value.read())["error"]["message"]

    queue, groups = f"/v2/{PARENT}/queuedResources?queuedResourceId=run", "/compute/v1/projects/test-project/global"
    code, message = post(queue, {"tpu": {"nodeSpecs": []}})
    assert code == 400 and "nodeSpecs" in message
    node = {"acceleratorConfig": {"type": "V9"}}
    code, message = post(queue, {"tpu": {"nodeSpec": [{"parent": PARENT, "node": node}]}})
    assert code == 400 and "V9" in message
    code, message = post(f"{groups}/instanceTemplates", {"properties": {"scheduling": {"provisioningModel": "spot"}}})
    assert code == 400 and "provisioningModel': 'spot'" in message


def test_existing_nodes_take_keys_stop_and_start(cloud: Cloud, tpu: Any) -> None:
    node = {"accelerator_type": "v6e-8", "runtime_version": "v2-alpha-tpuv6e"}
    name = tpu.create_node(parent=PARENT, node=node, node_id="mine").result().name
    tpu.update_node(node={"name": name, "metadata": {"ssh-keys": "me:key"}}, update_mask={"paths": ["metadata"]})
    (host,) = cloud.hosts()
    assert isinstance(host, PaperMachine) and host.metadata["attributes/ssh-keys"] == "me:key"
    cloud.maintenance("mine", datetime(2030, 1, 2, tzinfo=UTC))
    assert json.loads(host.metadata["upcoming-maintenance"])["window_start_time"] == "2030-01-02T00:00:00+00:00"
    tpu.stop_node(tpu_v2.StopNodeRequest(name=name))
    assert tpu.get_node(name=name).state.name == "STOPPED" and not cloud.hosts()
    tpu.start_node(tpu_v2.StartNodeRequest(name=name))
    assert len(cloud.hosts()) == 1
    tpu.delete_node(name=name).result()
    assert not cloud.remaining() and not cloud.hosts()


def test_a_host_deletes_its_own_resource_if_its_account_may(cloud: Cloud, tpu: Any) -> None:
    tpu.create_queued_resource(queued(service_account={"email": "run@p", "scope": [FULL_SCOPE]}))
    states(tpu)
    (host,) = cloud.hosts()
    assert isinstance(host, PaperMachine)
    token = json.loads(host.metadata["service-accounts/default/token"])["access_token"]

    def delete(token: str) -> int:
        request = urllib.request.Request(f"{cloud.endpoint}/v2/{QUEUED}?force=true", method="DELETE")
        request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    assert delete("stolen") == 401 and delete(token) == 403
    cloud.rights["run@p"] = {"tpu.nodes.*"}
    assert delete(token) == 200
    assert not cloud.remaining() and not host.is_running


def test_the_log_is_the_same_in_every_run(cloud: Cloud, tpu: Any) -> None:
    tpu.create_queued_resource(queued(metadata={"ssh-keys": "me:ssh-ed25519 AAAAC3Nz+x/= me@host"}))
    states(tpu)
    text = cloud.golden({"run": "RUN"})
    first, second = re.split(r"\n\n", text.rstrip())
    assert first.startswith(f"POST /v2/{PARENT}/queuedResources queuedResourceId=RUN\n{{")
    assert "me:ssh-ed25519 KEY" in first and "AAAA" not in text
    assert second == f"GET /v2/{PARENT}/queuedResources/RUN"  # once, however often it was asked
    method, path, body = cloud.log[0]
    assert method == "POST" and "queuedResourceId=run" in path and body["tpu"]["nodeSpec"][0]["nodeId"] == "run"


@pytest.mark.parametrize(
    ("name", "hosts"),
    [("v6e-1", 1), ("v6e-8", 1), ("v6e-64", 16), ("v5litepod-16", 4), ("v5p-8", 1), ("v5p-16", 2), ("v4-32", 4)],
)
def test_slices_have_the_hosts_of_the_real_ones(name: str, hosts: int) -> None:
    found = catalog.accelerator_type(name)
    assert found is not None and found.num_hosts == hosts
