"""Faults of hosts, made for real: `doctor` must name the check, the process, and what to do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.doctor import host
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.processes.door import SECRET, new_secret
from jaxinfra.storage.objects import ObjectStore
from tests import refusals
from tests.bench.slow_link import DEVICE, SlowLink, address_of
from tests.faults.machine import faketime_library, small_disk
from tests.servers.fixtures import Server
from tests.servers.guard import free_ports
from tests.several import all_ended, ending, free_address
from tests.tiny_run import Tiny, launch

CLONE = Path(__file__).parents[2]


def row(file: Path, check: str) -> dict[str, str]:
    """Returns the finding of a check; `file` is that of --json."""
    return {each["check"]: each for each in json.loads(file.read_text())["checks"]}[check]


def named(file: Path, check: str, level: str, *words: str) -> None:
    """Asserts level and words of a row, and that it says what to do."""
    found = row(file, check)
    assert found["level"] == level and found["fix"], found
    refusals.names(found["found"], *words)


def shell(*lines: str) -> tuple[str, ...]:
    """The words that run a command after these lines."""
    return ("sh", "-c", "\n".join([*lines, 'exec "$@"']), "sh")


@pytest.mark.slow(15)
def test_one_bad_host_of_two(tmp_path: Path) -> None:
    """Few open files, a clock an hour behind, another package and a slow disk."""
    library = faketime_library()
    if library is None or shutil.which("strace") is None:
        pytest.skip("needs libfaketime and strace")
    other = tmp_path / "packages" / "optax-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    slow = ("strace", "-f", "--seccomp-bpf", "-qqq", "-o", "/dev/null", "-e", "inject=fsync:delay_enter=4000000")
    bad = {
        "FAKETIME": "-1h",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": f"{other.parent}:{os.environ['PYTHONPATH']}",
    }
    address, found = free_address(), tmp_path / "found.json"
    children = [
        subprocess.Popen(
            [*prefix, sys.executable, "-m", "launch", "doctor", "--devices", "cpu:1", "--json", str(found)]
            + ["--coordinator", address, "--of", "2", "--process-id", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | env | {"JAX_NUM_CPU_DEVICES": "1"},
        )
        for index, (prefix, env) in enumerate(
            [((), {}), ((*shell("ulimit -n 200"), *slow, "env", f"LD_PRELOAD={library}"), bad)]
        )
    ]
    with ending(children):
        ends = all_ended(children)
    assert [each.code for each in ends] == [ConfigError.exit_code] * 2, ends
    named(found, "open files", "fail", "process 1 200")
    named(found, "clocks", "warn", "process 1 3,600 behind process 0")
    named(found, "packages", "fail", "optax 0.0.1 process 1 process 0")
    named(found, "disk", "warn", "process 1 MB/s")
    assert "process 0" not in row(found, "disk")["found"]


_TBF = "rate 20mbit burst 64kb latency 400ms"


@pytest.mark.slow(15)
@pytest.mark.skipif(shutil.which("tc") is None, reason="needs tc")
def test_a_slow_link_of_two_hosts(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    words = [
        "doctor",
        "--devices",
        "cpu:1",
        "--coordinator",
        f"{address_of(0)}:8476",
        "--of",
        "2",
        "--json",
        str(found),
    ]
    env = os.environ | {SECRET: new_secret(), "JAX_NUM_CPU_DEVICES": "1"}
    with SlowLink(delay_s=0.0, bits_per_s=10e9) as link:
        children = [
            link.start([*prefix, sys.executable, "-m", "launch", *words, "--process-id", str(index)], env)
            for index, prefix in enumerate([(), shell(f"tc qdisc add dev {DEVICE} root tbf {_TBF}")])
        ]
        ends = all_ended(children)
    assert [each.code for each in ends] == [0, 0], ends
    named(found, "links", "warn", "process 1 (slice-1) to process 0 (slice-0): MB/s")
    assert "to process 1" not in row(found, "links")["found"]


CHECK = """
from jaxinfra.doctor.compare import check_hosts
from jaxinfra.errors import JaxinfraError
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.processes.discovery import Processes
import sys
one = Processes(coordinator=sys.argv[1], count=2, index=int(sys.argv[2]), local_devices=None, source="")
with ConnectedPeers(one) as peers:
    check_hosts(peers, "runs")
    try:
        check_hosts(peers, "s3://bucket/runs")
    except JaxinfraError as error:
        print(error.exit_code, error)
    peers.gather(None)
"""


@pytest.mark.slow(5)
def test_before_step_0_of_several_hosts() -> None:
    """A wrong clock is a warning, and an error where requests are signed by it."""
    library = faketime_library()
    if library is None:
        pytest.skip("needs libfaketime")
    late = ("env", f"LD_PRELOAD={library}", "FAKETIME=-1h", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    with SlowLink(delay_s=0.0, bits_per_s=10e9) as link:
        children = [
            link.start([*prefix, sys.executable, "-c", CHECK, f"{address_of(0)}:8476", str(index)], os.environ)
            for index, prefix in enumerate([(), late])
        ]
        first, second = all_ended(children)
    wrong = "doctor: clocks process 1 (slice-1) 3,600 s behind"
    refusals.names(first.err.removesuffix("\n"), wrong)
    assert not second.err
    for each in (first, second):
        refusals.names(each.out.removesuffix("\n"), "81", wrong)


def test_a_full_disk(tiny: Tiny, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    with small_disk(2**20) as disk:
        if disk is None:
            pytest.skip("may not mount a disk")
        ends = tiny.launch(f"root={disk}", "mesh.fsdp=8", "--json", str(found), command="doctor")
        assert not [*disk.iterdir()]
    assert ends.code == StorageError.exit_code
    named(found, "space", "fail", f"{disk} free needs about")
    assert row(found, "mesh")["found"] == "fsdp 8"


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = ("--coordinator", f"127.0.0.1:{other.getsockname()[1]}", "--process-id", "0", "--of", "2")
        ends = launch("doctor", *where)
    refusals.refused(ends, f"{where[1]} process {os.getpid()} python JAX_COORDINATOR_PORT")


def test_an_old_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi and JAX's plugin are fakes."""
    fake, plugin = tmp_path / "nvidia-smi", tmp_path / "jax_cuda13_plugin-0.12.0.dist-info"
    fake.write_text("#!/bin/sh\necho '550.54.14, NVIDIA H100'\n")
    fake.chmod(0o755)
    plugin.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda13-plugin\nVersion: 0.12.0\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.syspath_prepend(tmp_path)
    assert launch("doctor", "--json", str(tmp_path / "found.json")).code == ConfigError.exit_code
    named(tmp_path / "found.json", "driver", "fail", "550.54.14 NVIDIA H100")
    fake.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert [found.level for each in ("cuda", "cpu") if (found := host.driver(each))] == ["fail", "warn"]


def test_a_sound_host_and_a_mesh_that_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert tiny.launch("mesh.fsdp=4", "mesh.tensor=2", "--json", str(found), command="doctor").code == 0
    for check in ("mesh", "mesh.fsdp=4", "mesh.tensor=2", "space", "batches and state", "data"):
        assert row(found, check)["level"] == "ok"
    assert "published" in row(found, "mesh.fsdp=4")["found"] and not tiny.runs.exists()
    assert tiny.launch("mesh.fsdp=3", "--json", str(found), command="doctor").code == ConfigError.exit_code
    named(found, "config", "fail", "mesh.fsdp=3")


def test_a_bucket(tiny: Tiny, gcs: Server, tmp_path: Path) -> None:
    """It is written and read, and one that refuses fails; nothing of it stays."""
    root, found = gcs.new_url(), tmp_path / "found.json"
    assert tiny.launch(f"root={root}", "--json", str(found), command="doctor").code == 0
    refusals.names(row(found, "bucket")["found"], "written read")
    assert not ObjectStore(root).list_names()
    ends = tiny.launch("root=gs://no-such-bucket/runs", "--json", str(found), command="doctor")
    assert ends.code == StorageError.exit_code
    named(found, "bucket", "fail", "gs://no-such-bucket/runs")


def test_a_bucket_whose_server_is_away(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked once, before all that needs it."""
    found = tmp_path / "found.json"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    ends = tiny.launch("root=s3://bucket/runs", "--json", str(found), command="doctor")
    assert ends.code == StorageError.exit_code
    named(found, "bucket", "fail", "s3://bucket/runs no server")
    assert not {"config", "data"}.intersection(each["check"] for each in json.loads(found.read_text())["checks"])
