"""`runs --place`: what runs have made in a cloud, how far they are, and what it costs."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from google.cloud import tpu_v2

from jaxinfra.cli.places import listing
from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places.gce import Gce
from jaxinfra.launchers.places.google_cloud import ENDPOINT
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.tpu_vm import TpuVm
from tests.cloud.machines import PaperMachines
from tests.cloud.server import Cloud
from tests.refusals import names, raises, refused
from tests.servers.fixtures import Server
from tests.tiny_run import Ended, launch

TPU = PlaceOptions(kind="tpu-vm", name="demo", project="test-project", zone="us-east5-b", create="v6e-16", spot=True)
GROUPS = replace(TPU, kind="gce", zone="us-central1-c", create="2xtpu7x:2x2x4", spot=False)


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cloud]:
    with Cloud(PaperMachines()) as made:
        monkeypatch.setenv(ENDPOINT, made.endpoint)
        monkeypatch.setenv("HOME", str(tmp_path))
        yield made


def listed(place: str, *options: str) -> Ended:
    ended = launch("runs", "--place", place, "--project", "test-project", *options)
    assert ended.code == 0 and not ended.err, ended
    return ended


@pytest.mark.parametrize("place", ["tpu-vm", "gce"])
def test_nothing_is_there_and_nothing_costs(cloud: Cloud, place: str) -> None:
    names(listed(place).out.strip(), f"test-project: nothing --place {place} any zone nothing that costs")
    names(listed(place, "--zone", "us-east5-b").out.strip(), "nothing us-east5-b")


def test_a_run_of_tpu_vms(cloud: Cloud, gcs: Server, stopped: Path, tmp_path: Path) -> None:
    """The run was stopped, so its machines have no reason to be there."""
    url = gcs.new_url()
    for name in ("run.json", "metrics.jsonl", "summary.json"):
        gcs.put(f"{url}/{name}", (stopped / "tiny" / name).read_bytes())
    TpuVm(TPU, url, poll_s=0.01).acquire(lambda line: None)
    prices = tmp_path / "prices.json"
    prices.write_text('{"v6e": 2.7, "v6e-spot": 1.25}')
    shown = listed("tpu-vm", "--prices", str(prices)).out
    header, _, row, *rest = [line for line in shown.splitlines() if line.strip()]
    assert header.split() == ["run", "state", "step", "chips", "spot", "zone", "age", "cost", "name", "kind"]
    names(row, f"{url} ACTIVE v6e:4x4 spot us-east5-b $20.00/h, up to demo queued resource")
    assert rest[0] == "in all $20.00/h"
    names(rest[1], f"next: runs stop {url} finished")
    assert len(rest) == 2
    cloud.preempt("demo", after_s=0)
    names(listed("tpu-vm", "--prices", str(prices)).out.splitlines()[3], "SUSPEND PREEMPTED")


def test_a_tpu_vm_that_is_not_well(cloud: Cloud) -> None:
    TpuVm(TPU, "/runs/story", poll_s=0.01).acquire(lambda line: None)
    (node,) = cloud.tpu._nodes.values()
    node.message.health, node.message.health_description = tpu_v2.Node.Health.UNHEALTHY_MAINTENANCE, "under repair"
    symptom = tpu_v2.Symptom(symptom_type=tpu_v2.Symptom.SymptomType.MESH_BUILD_FAIL, worker_id="2")
    node.message.symptoms.append(symptom)
    (row,) = [line for line in listed("tpu-vm").out.splitlines() if "ACTIVE" in line]
    names(row, "demo: UNHEALTHY_MAINTENANCE, under repair, MESH_BUILD_FAIL of worker 2")


def test_a_run_of_two_groups_that_has_not_begun(cloud: Cloud, gcs: Server, tmp_path: Path) -> None:
    """Each group is one slice; without its run, the command that deletes it is shown."""
    url = gcs.new_url()
    Gce(GROUPS, url, poll_s=0.01).acquire(lambda line: None)
    cloud.maintenance("demo-0", datetime(2030, 1, 1, tzinfo=UTC))
    prices = tmp_path / "prices.toml"
    prices.write_text("tpu7x = 12\n")
    for zone in ([], ["--zone", "us-central1-c"]):
        lines = listed("gce", "--prices", str(prices), *zone).out.splitlines()
        rows = [line for line in lines if "managed instance group" in line]
        assert len(rows) == 2
        for row in rows:
            names(row, f"{url} 4 of 4 RUNNING tpu7x:2x2x4 us-central1-c $192.00/h,")
            assert "2xtpu7x" not in row and " spot" not in row
        assert [("maintenance at 2030-01-01" in row) for row in sorted(rows, key=lambda row: "demo-1" in row)] == [
            True,
            False,
        ]
        assert "in all $384.00/h" in lines
        delete = "gcloud compute instance-groups managed delete demo-1 --zone=us-central1-c --project=test-project"
        assert f"or: {delete}" in lines
        (line,) = (line for line in lines if line.startswith("next:"))
        names(line, f"runs resume {url} goes on")
    assert "cost" not in listed("gce").out
    prices.write_text("v6e = 12\n")
    assert "in all $0.00/h, without 2 of unknown price" in listed("gce", "--prices", str(prices)).out


def test_chips_that_do_not_run_cost_nothing(cloud: Cloud, gcs: Server, tmp_path: Path) -> None:
    """A bucket that cannot be read is no error."""
    cloud.stockout("us-east5-b", times=100)
    TpuVm(TPU, "gs://another-bucket/runs/story").step(lambda line: None)
    prices = tmp_path / "prices.json"
    prices.write_text('{"v6e-spot": 1.25}')
    shown = listed("tpu-vm", "--prices", str(prices)).out
    assert "nothing now" in shown and "in all $0.00/h" in shown
    assert "gcloud compute tpus queued-resources delete demo --force --zone=us-east5-b" in shown


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("prices.json", '{"v6e": "2.7"}', "v6e '2.7' dollars"),
        ("prices.json", '{"v6e": -1}', "v6e -1"),
        ("prices.json", '{"v6e": true}', "v6e True"),
        ("prices.json", '{"v6e": Infinity}', "v6e inf"),
        ("prices.json", '{"v9x-spot": 1}', "v9x-spot no such chip v6e"),
        ("prices.json", "[2.7]", "list dollars"),
        ("prices.json", "v6e = 2.7", "dollars"),
        ("prices.toml", '{"v6e": 2.7}', "dollars"),
        ("prices.json", None, "No such file"),
        ("prices.json", b"\xff", "dollars"),
    ],
)
def test_a_wrong_price_file(tmp_path: Path, name: str, text: str | bytes | None, words: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with raises(ConfigError, f"--prices {path}", words):
        listing.read_prices(str(path))


def test_options_that_do_not_belong_together(cloud: Cloud) -> None:
    refused(launch("runs", "--zone", "us-east5-b"), "--zone us-east5-b --place tpu-vm gce")
    refused(launch("runs", "gs://bucket/runs", "--place", "gce"), "gs://bucket/runs --place")
    refused(launch("runs", "--place", "gce", "--project", "test-project", "--zone", "east"), "--zone east")
