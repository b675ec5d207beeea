"""Parts of the places of Google Cloud that need no cloud: chips, names, keys, errors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.launchers.places import images
from jaxinfra.launchers.places.google_cloud import (
    ENDPOINT,
    Origin,
    Wait,
    check_key,
    key_of,
    label_of,
    located,
    public_key,
)
from jaxinfra.launchers.places.google_errors import PERMISSIONS, ROLES, Stockout, error_of
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.tpu_vm import TpuVm
from tests.refusals import names, raises

RUN = "gs://bucket/runs/Qwen tune"
TPU = PlaceOptions(kind="tpu-vm", name="demo", project="p", zone="us-east5-b", create="v6e-16", user="ada")


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
def test_options_that_are_wrong(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], named: str) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")  # so that no project is looked for
    for variable in ("GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CORE_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    with raises(ConfigError, named):
        located(replace(TPU, **change), RUN)


def test_a_run_has_a_name_of_its_own() -> None:
    assert located(replace(TPU, name=""), RUN).name == f"run-{label_of(RUN)}"


def test_the_key_is_made_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    key = public_key(TPU)
    assert key.startswith("ssh-ed25519 ") and key.endswith(" ada") and public_key(TPU) == key
    private = tmp_path / ".ssh/google_compute_engine"
    assert private.stat().st_mode & 0o777 == 0o600
    private.with_suffix(".pub").unlink()  # made again from the private key
    assert public_key(TPU).split()[:2] == key.split()[:2]
    elsewhere = replace(TPU, ssh_key=str(tmp_path / "missing"))  # the key of another launching machine
    assert public_key(elsewhere).split()[:2] == key.split()[:2] and key_of(elsewhere) == private
    with raises(ConfigError, "--ssh-key missing"):
        check_key(elsewhere)
    check_key(TPU)


def test_a_wait_says_what_changes_and_ends() -> None:
    said: list[str] = []
    wait = Wait(said.append, 1.0, poll_s=0.0)
    for what in ("a queue", "a queue", "a boot"):
        wait.pause(what)
    assert said == ["waiting: a queue", "waiting: a boot"]
    with raises(ConfigError, "--wait-hours boot --zone"):
        Wait(said.append, -1.0, poll_s=0.0).pause("a boot")


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
        TpuVm(TPU, RUN).acquire(lambda line: None)
