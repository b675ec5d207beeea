"""Places of Google Cloud against APIs that answer as the real ones do."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.launchers.places import images
from jaxinfra.launchers.places.gce import Gce
from jaxinfra.launchers.places.gce import list_resources as list_groups
from jaxinfra.launchers.places.google_cloud import ENDPOINT, Origin, Wait, label_of, located, public_key
from jaxinfra.launchers.places.google_errors import PERMISSIONS, ROLES, Stockout, error_of
from jaxinfra.launchers.places.place import HostSource, PlaceOptions
from jaxinfra.launchers.places.tpu_vm import TpuVm
from jaxinfra.launchers.places.tpu_vm import list_resources as list_tpu_vms
from tests.cloud.machines import PaperMachines
from tests.cloud.server import Cloud
from tests.refusals import names, raises

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


def place(options: PlaceOptions, run: str = RUN) -> HostSource:
    return {"tpu-vm": TpuVm, "gce": Gce}[options.kind](options, run, poll_s=0.01)


def changes(cloud: Cloud) -> list[tuple[str, Any]]:
    """Path and body of the requests that make or change something."""
    asked = [(path.partition("?")[0], body) for method, path, body in cloud.log if method in ("POST", "PATCH")]
    return [each for each in asked if not each[0].endswith("/listManagedInstances")]


def test_chips_without_an_api_name_the_other_place() -> None:
    with raises(ConfigError, "--create tpu7x:4x4x4 --place gce"):
        images.tpu_type(images.topology_of("tpu7x:4x4x4"))
    with raises(ConfigError, "--create v4:2x2x2 --place tpu-vm"):
        images.machines_of(images.topology_of("v4-16"))
    with raises(ConfigError, "--create h200:1x4 h200:1x8"):
        images.machines_of(images.topology_of("h200:1x4"))
    with raises(ConfigError, "--create v9 v5p"):
        images.topology_of("v9-8")


@pytest.mark.parametrize(
    ("create", "accelerator"),
    [("v6e-64", "v6e-64"), ("v5e:4x4", "v5litepod-16"), ("v5p:2x2x2", "v5p-16"), ("v4:2x2x8", None)],
)
def test_accelerator_types(create: str, accelerator: str | None) -> None:
    assert images.accelerator_type(images.topology_of(create)) == accelerator


@pytest.mark.parametrize(
    ("create", "machine", "hosts", "topology"),
    [
        ("v6e-8", "ct6e-standard-8t", 1, ""),
        ("v6e-64", "ct6e-standard-4t", 16, "8x8"),
        ("v5p-8", "ct5p-hightpu-4t", 1, ""),
        ("2xtpu7x:4x4x4", "tpu7x-standard-4t", 16, "4x4x4"),
        ("h100:2x8", "a3-highgpu-8g", 2, ""),
        ("a100:1x4", "a2-ultragpu-4g", 1, ""),
    ],
)
def test_machines(create: str, machine: str, hosts: int, topology: str) -> None:
    found = images.machines_of(images.topology_of(create))
    assert (found.machine, found.hosts, found.topology) == (machine, hosts, topology)


def test_rows_have_sources() -> None:
    for row in [*images.TPU_TYPES.values(), *images.MACHINE_TYPES.values()]:
        assert row.source.startswith("https://docs.cloud.google.com/")


def test_origin_is_read_from_a_description() -> None:
    origin = Origin(run="/runs/a on b", chips="2xv5e:4x4", spot=True)
    assert Origin.parse(str(origin)) == origin
    assert Origin.parse("made by hand") is None


def test_labels_are_valid_and_differ() -> None:
    labels = {label_of(run) for run in (RUN, "gs://bucket/other/Qwen tune", "/x/" + "long" * 99, "/x/äöü")}
    assert len(labels) == 4
    assert all(len(label) <= 63 and label.replace("-", "").isalnum() and label.islower() for label in labels)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"project": ""}, "--project"),
        ({"zone": "mars"}, "--zone mars us-east5-b"),
        ({"name": "Big_One"}, "--name Big_One"),
        ({"create": "", "name": ""}, "--place --create --name"),
    ],
)
def test_options_that_are_wrong(cloud: Cloud, change: dict[str, Any], named: str) -> None:
    with raises(ConfigError, named):
        located(replace(TPU, **change), RUN)


def test_a_run_has_a_name_of_its_own(cloud: Cloud) -> None:
    assert located(replace(TPU, name=""), RUN).name == f"run-{label_of(RUN)}"


def test_the_key_is_made_once(cloud: Cloud, tmp_path: Path) -> None:
    key = public_key(TPU)
    assert key.startswith("ssh-ed25519 ") and key.endswith(" ada") and public_key(TPU) == key
    private = tmp_path / ".ssh/google_compute_engine"
    assert private.stat().st_mode & 0o777 == 0o600
    private.with_suffix(".pub").unlink()  # made again from the private key
    assert public_key(TPU).split()[:2] == key.split()[:2]
    with raises(ConfigError, "--ssh-key missing"):
        public_key(replace(TPU, ssh_key=str(tmp_path / "missing")))


def test_a_wait_says_what_changes_and_ends() -> None:
    said = Said()
    wait = Wait(said, 1.0, poll_s=0.0)
    for what in ("a queue", "a queue", "a boot"):
        wait.pause(what)
    assert said == ["waiting: a queue", "waiting: a boot"]
    with raises(ConfigError, "--wait-hours boot --zone"):
        Wait(said, -1.0, poll_s=0.0).pause("a boot")


@pytest.mark.parametrize(
    ("code", "message", "kind", "named"),
    [
        (403, "Permission 'tpu.nodes.create' denied on 'x/locations/us-a1-b' (or it may not exist)", ConfigError,
         "tpu.nodes.create roles/tpu.admin"),
        (403, "Required 'compute.instances.list' permission for 'p'", ConfigError, "roles/compute.instanceAdmin.v1"),
        (403, "Permission denied on 'locations/us-mars1-z' (or it may not exist).", ConfigError, "--zone us-mars1-z"),
        (400, "Invalid value for field 'zone': 'mars'. Unknown zone.", ConfigError, "--zone mars zones list"),
        (429, "Quota limit 'TPUV6EPerProject' has been exceeded. Limit: 8", ConfigError, "quota TPUV6EPerProject 8"),
        (429, "Quota exceeded for quota metric 'Reads' per minute", StorageError, "start again"),
        (503, "The service is unavailable", StorageError, "start again"),
        (0, "ZONE_RESOURCE_POOL_EXHAUSTED: The zone does not have enough resources", Stockout, "capacity"),
        (429, 'There is no more capacity in the zone "us-east5-b"', Stockout, "capacity us-east5-b"),
        (401, "Request had invalid authentication credentials.", ConfigError, "gcloud auth application-default login"),
        (403, "Cloud TPU API has not been used in project 7 before or it is disabled.", ConfigError,
         "services enable tpu.googleapis.com"),
        (409, "The resource 'x' already exists", ConfigError, "x --name"),
    ],
)  # fmt: skip
def test_errors_are_one_line(code: int, message: str, kind: type[Exception], named: str) -> None:
    error = error_of("--create v6e-8", code, message)
    assert type(error) is kind
    names(str(error), named, "--create")


def test_each_permission_has_a_role() -> None:
    for permissions in PERMISSIONS.values():
        assert {permission.partition(".")[0] for permission in permissions} <= set(ROLES)


def test_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path))
    with raises(StorageError, "no answer"):
        place(TPU).acquire(Said())


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
    assert cloud.remaining() == exists and by_name.deletion() == ""
    with raises(ConfigError, "--name nope demo --create"):
        place(replace(options, create="", name="nope")).acquire(Said())


def test_a_dry_run_shows_the_queued_resource(cloud: Cloud) -> None:
    demo = place(replace(MULTISLICE, internal_ips=True, reservation="mine", spot=False))
    cloud.reservations.add("mine")
    (request,) = demo.requests()
    assert not cloud.log
    body = json.loads(request.body)
    assert body["reservationName"].endswith("us-west4-a/reservations/mine") and body["guaranteed"] == {}
    assert body["queueingPolicy"] == {"validUntilDuration": "86400s"}
    demo.acquire(Said())
    assert [sent for _, sent in changes(cloud)] == [body]
    assert request.url.startswith(cloud.endpoint) and request.url.endswith("/queuedResources?queuedResourceId=demo")
    assert demo.deletion().endswith("/queuedResources/demo?force=true")


def test_a_dry_run_shows_policy_template_and_groups(cloud: Cloud) -> None:
    demo = place(replace(GROUPS, max_hours=2.0))
    requests = demo.requests()
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
    assert [url.rpartition("/")[2] for url in demo.deletion().split()] == ["demo-0", "demo-1"]


def test_a_reservation_and_gpus_of_compute_engine() -> None:
    options = replace(GCE, zone="us-west1-c", create="b200:2x8", spot=False, reservation="mine", network="net")
    policy, template, group = (json.loads(request.body) for request in place(options).requests())
    assert policy["workloadPolicy"] == {"type": "HIGH_THROUGHPUT"} and group["targetSize"] == 2
    properties = template["properties"]
    assert properties["scheduling"]["provisioningModel"] == "RESERVATION_BOUND"
    assert properties["reservationAffinity"]["values"] == ["mine"]
    assert properties["networkInterfaces"][0]["network"] == "projects/test-project/global/networks/net"
    assert len(place(replace(options, create="b200:1x8")).requests()) == 2  # one host is placed anywhere


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
