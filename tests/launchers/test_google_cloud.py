"""Places of Google Cloud against APIs that answer as the real ones do."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError, Preempted, StorageError
from jaxinfra.launchers.places import gce_messages as messages
from jaxinfra.launchers.places import google_cloud
from jaxinfra.launchers.places.gce import Gce
from jaxinfra.launchers.places.gce import list_resources as list_groups
from jaxinfra.launchers.places.google_cloud import ENDPOINT, Raced, client_of, public_key
from jaxinfra.launchers.places.place import PlaceOptions, Request
from jaxinfra.launchers.places.tpu_vm import TpuVm
from jaxinfra.launchers.places.tpu_vm import list_resources as list_tpu_vms
from tests.cloud.answers import Refused
from tests.cloud.machines import PaperMachines
from tests.cloud.server import Cloud
from tests.refusals import raises

RUN = "gs://bucket/runs/Qwen tune"
TPU = PlaceOptions(
    kind="tpu-vm", name="demo", project="test-project", zone="us-east5-b", create="v6e-16", spot=True, user="ada"
)
MULTISLICE = replace(TPU, zone="us-west4-a", create="2xv5e:4x4")
GCE = replace(TPU, kind="gce")
GROUPS = replace(GCE, zone="us-central1-c", create="2xtpu7x:2x2x4")
BOTH = pytest.mark.parametrize("options", [TPU, GCE], ids=["tpu-vm", "gce"])
SLICES = pytest.mark.parametrize("options", [MULTISLICE, GROUPS], ids=["tpu-vm", "gce"])


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(PaperMachines(), external=lambda address: address.replace("10.", "34.")) as made:
        monkeypatch.setenv(ENDPOINT, made.endpoint)
        monkeypatch.setenv("HOME", str(tmp_path))
        yield made


class Said(list[str]):
    """Collects lines; as `Say`."""

    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)

    def has(self, *words: str) -> bool:
        return any(all(word in line for word in words) for line in self)


def place(options: PlaceOptions, run: str = RUN) -> TpuVm | Gce:
    return {"tpu-vm": TpuVm, "gce": Gce}[options.kind](options, run, poll_s=0.01)


def makes(options: PlaceOptions) -> list[Request]:
    """Returns the requests of a dry run that make something."""
    return [request for request in place(options).requests() if request.why.startswith("makes")]


def changes(cloud: Cloud) -> list[tuple[str, Any]]:
    """Path and body of the requests that make or change something."""
    asked = [(path.partition("?")[0], body) for method, path, body in cloud.log if method in ("POST", "PATCH")]
    return [each for each in asked if not each[0].endswith("/listManagedInstances")]


@SLICES
def test_slices_are_made_and_deleted(cloud: Cloud, options: PlaceOptions) -> None:
    demo, said = place(options), Said()
    assert not demo.current()
    hosts = demo.acquire(said)
    assert [host.slice for host in hosts] == [0] * 4 + [1] * 4
    assert [host.name for host in hosts] == sorted(host.name for host in hosts)
    assert hosts[0].name.startswith("demo-0-") and hosts[4].name.startswith("demo-1-")
    assert hosts[0].address.startswith("ada@34.") and hosts[0].internal.startswith("10.")
    assert demo.current() == hosts and demo.lost() == ""
    assert said.has("requested", options.zone) and said.has("waiting")
    demo.release(said)
    assert said.has("deleted", "demo") and not cloud.remaining() and "deleted" in demo.lost()
    demo.release(said)  # again, and nothing happens


@BOTH
def test_a_second_start_takes_what_exists(cloud: Cloud, options: PlaceOptions) -> None:
    hosts, asked = place(options).acquire(Said()), changes(cloud)
    assert len(hosts) == 4
    assert place(options).acquire(Said()) == hosts and changes(cloud) == asked


@BOTH
def test_a_stockout_is_a_wait(cloud: Cloud, options: PlaceOptions) -> None:
    cloud.stockout("us-east5-b", times=3)
    said = Said()
    assert len(place(options).acquire(said)) == 4
    assert said.has("waiting", "waiting for resources" if options.kind == "tpu-vm" else "no capacity")


@BOTH
def test_a_wait_that_ends_leaves_nothing(cloud: Cloud, options: PlaceOptions) -> None:
    cloud.stockout("us-east5-b", times=10**6)
    with raises(ConfigError, "--wait-hours demo"):
        place(replace(options, wait_hours=1 / 3600)).acquire(Said())
    assert not cloud.remaining()


def test_a_request_that_has_expired_is_made_again(cloud: Cloud) -> None:
    cloud.stockout("us-east5-b", times=10**6)
    TpuVm(replace(TPU, wait_hours=1 / 3600), RUN).step(Said())  # asks, and is killed
    time.sleep(1.1)
    for _ in range(3):  # reads move its state on
        assert place(TPU).lost()
    cloud.stockout("us-east5-b", times=0)
    said = Said()
    assert len(place(TPU).acquire(said)) == 4
    assert said.has("demo failed", "valid") and said.has("to make it again")


def at(question: int, act: Callable[[], Any], answer: bool = True) -> Callable[[], bool]:
    """Returns a `go_on` that acts at a question, as another machine would then, and answers True until then."""
    asked = 0

    def go_on() -> bool:
        nonlocal asked
        asked += 1
        if asked == question:
            act()
        return answer or asked < question

    return go_on


@pytest.mark.parametrize("question", [1, 2, 3, 4, 5])
@SLICES
def test_two_machines_make_the_same(cloud: Cloud, options: PlaceOptions, question: int) -> None:
    hosts = place(options).acquire(Said(), at(question, lambda: place(options).step(Said())))
    assert len(hosts) == 8 and hosts == place(options).acquire(Said())
    assert not [path for method, path, _ in cloud.log if method == "DELETE"]


def test_a_name_that_stays_taken_is_refused(cloud: Cloud) -> None:
    place(replace(MULTISLICE, create="v5e:4x4", name="demo-0"), "/runs/other").acquire(Said())
    with raises(Raced, "nodes/demo-0 exists --name"):
        place(MULTISLICE).acquire(Said())


@BOTH
def test_what_another_machine_has_made_stays(cloud: Cloud, options: PlaceOptions) -> None:
    demo = place(options)
    demo.acquire(Said())
    cloud.preempt("demo", after_s=0)
    place(options).acquire(Said())
    exists, permission = cloud.remaining(), {"tpu-vm": "tpu.nodes.list", "gce": "compute.instances.list"}[options.kind]
    cloud.deny(permission)
    with raises(ConfigError, permission):
        demo.acquire(Said())
    assert cloud.remaining() == exists
    cloud.allow(permission)
    demo.release(Said())
    cloud.deny(permission)
    with raises(ConfigError, permission):
        demo.acquire(Said())  # makes them itself
    assert not cloud.remaining()


@pytest.mark.parametrize("change", [{"max_hours": 2.0}, {"internal_ips": True}, {"spot": False}, {}])
def test_a_template_of_other_options_is_made_again(cloud: Cloud, change: dict[str, Any]) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place(replace(GCE, **change)).acquire(Said(), at(4, die))
    assert [path.rpartition("/")[2] for path, _ in changes(cloud)] == ["resourcePolicies", "instanceTemplates"]
    asked = len(changes(cloud))
    assert len(place(GCE).acquire(Said())) == 4
    made = [path.rpartition("/")[2] for path, _ in changes(cloud)[asked:]]
    assert made == [*(["instanceTemplates"] if change else []), "instanceGroupManagers"]


@pytest.mark.parametrize("question", [1, 2, 3, 4, 5])
@SLICES
def test_a_run_that_is_stopped_while_it_waits(cloud: Cloud, options: PlaceOptions, question: int) -> None:
    cloud.stockout(options.zone, times=10**6)
    with raises(Preempted, f"stopped by the user {options.zone}"):
        place(options).acquire(Said(), at(question, lambda: place(options).release(Said()), answer=False))
    assert not cloud.remaining()


@BOTH
def test_no_answer_later_is_a_wait(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, options: PlaceOptions) -> None:
    def fail() -> None:
        raise StorageError("the network is away")

    with raises(StorageError, "network"):
        place(options).acquire(Said(), at(1, fail))
    demo, said = place(options), Said()
    assert not demo.current()
    assert len(demo.acquire(said, at(1, fail))) == 4 and said.has("waiting", "network")
    monkeypatch.setattr(google_cloud, "_OPERATION_S", 0.0)
    cloud.delay_s = 60.0
    with raises(StorageError, "delete demo operation-"):
        demo.release(said)


@BOTH
def test_a_key_that_others_overwrite(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, options: PlaceOptions) -> None:
    place(options).acquire(Said())
    api, name = (cloud.tpu, "_update_nodes") if options.kind == "tpu-vm" else (cloud.compute, "_setMetadata_instances")
    answer, lost = getattr(api, name), list[str]()

    def race(asked: Any, parent: str, target: str) -> Any:
        if target in lost:
            return answer(asked, parent, target)
        lost.append(target)
        if options.kind == "gce":
            raise Refused(412, "FAILED_PRECONDITION", "Supplied fingerprint does not match", reason="conditionNotMet")
        return answer(replace(asked, body=asked.body.replace(b"bob:", b"eve:")), parent, target)

    monkeypatch.setattr(api, name, race)
    assert len(place(replace(options, user="bob")).current()) == 4 and lost
    asked = len(changes(cloud))
    place(replace(options, user="bob")).current()
    assert len(changes(cloud)) == asked  # has the key now


@SLICES
def test_what_was_preempted_is_made_again(cloud: Cloud, options: PlaceOptions) -> None:
    demo, said = place(options), Said()
    first = demo.acquire(said)
    cloud.preempt("demo-1", after_s=0)
    assert "preempted" in demo.lost()
    second = demo.acquire(said)
    assert len(second) == 8
    assert {host.address for host in second[4:]}.isdisjoint(host.address for host in first)
    assert said.has("to make it again") and demo.lost() == ""


@BOTH
def test_another_run_is_left_alone(cloud: Cloud, options: PlaceOptions) -> None:
    place(options).acquire(Said())
    other = place(options, "/runs/other")
    with raises(ConfigError, f"--name demo {RUN}"):
        other.acquire(Said())
    exists = cloud.remaining()
    other.release(Said())
    assert cloud.remaining() == exists and not other.current()


@pytest.mark.parametrize(
    ("options", "permission", "role"),
    [
        (TPU, "tpu.nodes.create", "roles/tpu.admin"),
        (GCE, "compute.instanceGroupManagers.create", "roles/compute.instanceAdmin.v1"),
    ],
    ids=["tpu-vm", "gce"],
)
def test_refusals(cloud: Cloud, options: PlaceOptions, permission: str, role: str) -> None:
    cloud.deny(permission)
    with raises(ConfigError, "v6e", permission, role):
        place(options).acquire(Said())
    cloud.allow(permission)
    cloud.quota["v6e"] = 8
    with raises(ConfigError, "quota V6E 8 --create"):
        place(options).acquire(Said())
    cloud.quota.clear()
    with raises(ConfigError, "--zone us-mars1-a"):
        place(replace(options, zone="us-mars1-a")).acquire(Said())
    with raises(ConfigError, "us-west4-a --zone"):
        place(replace(options, zone="us-west4-a")).acquire(Said())
    assert not cloud.remaining()


def test_a_runtime_version_that_is_unknown(cloud: Cloud) -> None:
    with raises(ConfigError, "runtime nope"):
        place(replace(TPU, image="nope")).acquire(Said())


@BOTH
def test_what_exists_gets_our_key_and_stays(cloud: Cloud, options: PlaceOptions) -> None:
    hosts, said = place(options).acquire(Said()), Said()
    by_name = place(replace(options, create="", user="bob"), "/runs/other")
    asked = len(changes(cloud))
    found = by_name.acquire(said)
    assert [host.internal for host in found] == [host.internal for host in hosts]
    assert found[0].address.startswith("bob@") and by_name.current() == found and by_name.lost() == ""
    bodies = [json.dumps(body) for _, body in changes(cloud)[asked:]]
    assert len(bodies) == (1 if options.kind == "tpu-vm" else 4)
    assert all(0 < body.index("ada:ssh") < body.index("bob:ssh") for body in bodies)
    asked = len(changes(cloud))
    by_name.acquire(said)  # has the key now
    assert len(changes(cloud)) == asked
    exists = cloud.remaining()
    by_name.release(said)
    assert cloud.remaining() == exists and not by_name.deletion()
    with raises(ConfigError, "--name nope demo --create"):
        place(replace(options, create="", name="nope")).acquire(Said())


def test_a_stopped_tpu_vm_says_how_to_start_it(cloud: Cloud) -> None:
    place(replace(TPU, create="v6e-8")).acquire(Said())
    client = client_of("tpu_v2", "TpuClient")
    client.stop_node(request={"name": "projects/test-project/locations/us-east5-b/nodes/demo"})
    by_name = place(replace(TPU, create=""))
    with raises(ConfigError, "--name demo STOPPED gcloud compute tpus tpu-vm start demo --zone us-east5-b"):
        by_name.acquire(Said())


def test_a_machine_that_exists(cloud: Cloud) -> None:
    options = replace(GCE, create="v6e-8")
    (template,) = (json.loads(request.body) for request in makes(options) if "Templates" in request.url)
    types = messages.compute_module()
    machine = types.InstanceTemplate.from_json(json.dumps(template)).properties
    zone = "projects/test-project/zones/us-east5-b"
    single = {key: getattr(machine, key) for key in ("disks", "network_interfaces", "scheduling", "service_accounts")}
    instance = types.Instance(name="demo", machine_type=f"{zone}/machineTypes/{machine.machine_type}", **single)
    request = {"project": "test-project", "zone": "us-east5-b", "instance_resource": instance}
    client_of("compute_v1", "InstancesClient").insert(request=request).result()
    by_name, said = place(replace(GCE, create="")), Said()
    (host,) = by_name.acquire(said)
    assert host.name == "demo" and host.address.startswith("ada@34.") and said.has("waiting", "demo is")
    assert by_name.current() == [host] and by_name.lost() == ""
    exists = cloud.remaining()
    by_name.release(said)
    assert cloud.remaining() == exists


def test_a_dry_run_makes_no_key(cloud: Cloud, tmp_path: Path) -> None:
    for options in (TPU, GCE):
        assert "ada:(public key of" in "".join(request.body for request in place(options).requests())
    assert not (tmp_path / ".ssh").exists()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/missing/key.json")
    with raises(ConfigError, "/missing/key.json gcloud auth application-default login"):
        client_of("tpu_v2", "TpuClient")


def test_a_dry_run_shows_the_queued_resource(cloud: Cloud) -> None:
    demo = place(replace(MULTISLICE, internal_ips=True, reservation="mine", spot=False))
    cloud.reservations.add("mine")
    public_key(TPU)
    (request,) = makes(demo.options)
    assert not cloud.log
    body = json.loads(request.body)
    assert body["reservationName"].endswith("us-west4-a/reservations/mine") and body["guaranteed"] == {}
    assert body["queueingPolicy"] == {"validUntilDuration": "86400s"}
    demo.acquire(Said())
    assert [sent for _, sent in changes(cloud)] == [body]
    assert request.url.startswith(cloud.endpoint) and request.url.endswith("/queuedResources?queuedResourceId=demo")
    assert demo.deletion()[0].endswith("/queuedResources/demo?force=true")


def test_a_dry_run_shows_policy_template_and_groups(cloud: Cloud) -> None:
    demo = place(replace(GROUPS, max_hours=2.0))
    public_key(TPU)
    requests = makes(demo.options)
    assert not cloud.log
    bodies = [json.loads(request.body) for request in requests]
    assert bodies[0]["workloadPolicy"] == {"type": "HIGH_THROUGHPUT", "acceleratorTopology": "2x2x4"}
    scheduling = bodies[1]["properties"]["scheduling"]
    assert scheduling["provisioningModel"] == "SPOT" and scheduling["instanceTerminationAction"] == "DELETE"
    assert scheduling["maxRunDuration"] == {"seconds": "7200"}
    assert [(body["name"], body["targetSize"]) for body in bodies[2:]] == [("demo-0", 4), ("demo-1", 4)]
    demo.acquire(Said())
    urls = [request.url.removeprefix(cloud.endpoint) for request in requests]
    assert changes(cloud) == list(zip(urls, bodies, strict=True))
    assert [url.rpartition("/")[2] for url in demo.deletion()] == ["demo-0", "demo-1"]


def test_a_reservation_and_gpus_of_compute_engine() -> None:
    options = replace(GCE, zone="us-west1-c", create="b200:2x8", spot=False, reservation="mine", network="net")
    policy, template, group = (json.loads(request.body) for request in makes(options))
    assert policy["workloadPolicy"] == {"type": "HIGH_THROUGHPUT"} and group["targetSize"] == 2
    properties = template["properties"]
    assert properties["scheduling"]["provisioningModel"] == "RESERVATION_BOUND"
    assert properties["reservationAffinity"]["values"] == ["mine"]
    assert properties["networkInterfaces"][0]["network"] == "projects/test-project/global/networks/net"
    assert len(makes(replace(options, create="b200:1x8"))) == 2  # one host is placed anywhere


@BOTH
def test_a_dry_run_shows_every_request_of_a_life(options: PlaceOptions) -> None:
    """The golden file has those that a run of several hosts has sent until nothing was left."""
    name = f"life-{options.kind}"
    golden = (Path(__file__).parents[1] / "golden" / "cloud" / f"{options.kind}.txt").read_text()
    golden = re.sub("operation-N", "OPERATION", re.sub(r"instances/life-gce-\w{4}", "instances/MACHINE", golden))
    sent = {tuple(line.split()) for line in re.findall(r"^[A-Z]+ /.*", golden, re.M)}
    (zone,) = set(re.findall(r"us-east5-\w", golden))
    shown = place(replace(options, name=name, zone=zone), f"s3://bucket-of-tests/cloud/runs/{name}").requests()
    paths = [(request.method, *request.url.replace("https://", "").partition("/")[2].split("?")) for request in shown]
    assert {(method, f"/{path}", *query) for method, path, *query in paths} == sent


def test_a_list_has_what_runs_made(cloud: Cloud) -> None:
    place(TPU).acquire(Said())
    place(GROUPS).acquire(Said())
    for zone in ("-", "us-east5-b"):
        (found,) = list_tpu_vms("test-project", zone)
        assert (found.name, found.run, found.zone, found.chips) == ("demo", RUN, "us-east5-b", "v6e:4x4")
        assert found.state == "ACTIVE" and found.spot and found.created.startswith("20") and not found.notice
    cloud.preempt("demo", after_s=0)
    assert "PREEMPTED" in list_tpu_vms("test-project")[0].notice
    assert not list_tpu_vms("test-project", "us-west4-a")
    for zone in ("-", "us-central1-c"):
        groups = list_groups("test-project", zone)
        assert [group.name for group in groups] == ["demo-0", "demo-1"]
        assert groups[0].run == RUN and groups[0].state == "4 of 4 RUNNING" and groups[0].chips == "2xtpu7x:2x2x4"
    cloud.maintenance("demo-0", datetime(2030, 1, 1, tzinfo=UTC))
    first, second = list_groups("test-project")
    assert "2030-01-01" in first.notice and not second.notice
