"""Runs as jobs of Ray: a real cluster on this machine, with its jobs server and workers of Ray Train."""

import json
import math
import os
import re
import threading
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.cli.ray_worker import check_shared
from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.launchers.places import ray_jobs
from jaxinfra.launchers.places.bundle import make_bundle
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.ray_log import RankFilter
from jaxinfra.launchers.places.ray_package import take_secrets, write_package
from jaxinfra.launchers.places.ray_submission import scaling_of
from tests.cloud.laptop import Laptop, power_off, until
from tests.conftest import ROOT
from tests.refusals import raises
from tests.servers.ray import ray_cluster
from tests.tiny_run import Tiny

pytest.importorskip("ray.dashboard.modules.job.sdk")

STEPS = 30
SECRET = "worth-hiding"
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    with ray_cluster(cpus=2) as environment:
        yield environment


@pytest.fixture
def user(cluster: Mapping[str, str], tiny: Tiny, tmp_path: Path) -> Laptop:
    """A user with a secret, which the config needs wherever it is loaded."""
    tiny.config.write_text(f"import os\n\nos.environ['TOKEN']\n{tiny.config.read_text()}")
    (tiny.config.parent / ".gitignore").write_text("*\n!*.py\n")
    user = Laptop(tmp_path / "home", {**cluster, **QUICK, "TOKEN": SECRET}, project=tiny.config.parent)
    user.commit()
    return user


def ask(cluster: Mapping[str, str], path: str, body: Mapping[str, object] | None = None) -> Any:
    """Returns what the server of jobs says."""
    headers = {"Authorization": f"Bearer {cluster['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{cluster['RAY_ADDRESS']}/api/jobs/{path}", data, headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.loads(answer.read())


def words(tiny: Tiny, *more: str) -> list[str]:
    """Returns a command line that trains in two processes."""
    return [tiny.config.name, f"train.steps={STEPS}", "checkpoint.save_every=10", "train.eval_every=none", *more]


def on_ray(count: int, **environment: str | Path) -> list[str]:
    """Returns the options of a start with this number of workers."""
    told = {**QUICK, **environment}
    chosen = ["--place", "ray", "--accelerator", f"cpu:{count}", "--devices", "cpu:1", "--secret", "TOKEN"]
    return [*chosen, *(word for name, value in told.items() for word in ("--env", f"{name}={value}"))]


@pytest.mark.slow(120)
def test_a_run_waits_loses_a_worker_is_stopped_and_resumed(
    user: Laptop, cluster: Mapping[str, str], tiny: Tiny, tmp_path: Path
) -> None:
    other = ask(cluster, "", {"entrypoint": "sleep infinity", "entrypoint_num_cpus": 1})["submission_id"]
    run, log, fired = str(tiny.directory()), tmp_path / "start.log", tmp_path / "fired"
    faults = on_ray(2, JAXINFRA_FAIL="step:1:14:kill,step:0:20:sleep=45", JAXINFRA_FAIL_LOG=fired)
    process = user.start(*words(tiny, "name=tiny", *faults), log=log)
    try:
        need = "waiting: the workers need 2 CPU, of which the cluster has 2, free 1"
        until(lambda: need in log.read_text(), "waiting for workers", process, log)
        ask(cluster, f"{other}/stop", {})
        until(lambda: (fired / "step:0:20:sleep=45").exists(), "training again", process, log)
        assert (fired / "step:1:14:kill@1").exists()
        until(lambda: f"resuming {run}" in log.read_text(), "saying so", process, log)
        assert "exit code 76 (another process lost): starting again" in log.read_text()
        stopped = user.run("runs", "stop", run)
        assert not stopped.returncode, stopped.stderr
        assert process.wait(600) == 75, log.read_text()
        last = max(tiny.losses())
        assert 20 <= last < STEPS and (tiny.directory() / "checkpoints" / str(last)).exists()

        resumed = user.start("runs", "resume", run, log=(again := tmp_path / "resume.log"))
        reference = user.run(*words(tiny, "name=reference", "--devices", "cpu:2"))
        assert not reference.returncode, reference.stderr
        assert resumed.wait(600) == 0, again.read_text()
        assert f"at step {last} of {STEPS}" in again.read_text()
        assert tiny.losses() == tiny.losses("reference") and max(tiny.losses()) == STEPS
        lines = user.run("runs", "logs", run, "--lines", "200").stdout
        assert f"{STEPS}/{STEPS}" in lines and "pid=" not in lines, lines
    finally:
        power_off(process)
    recorded = json.dumps(ask(cluster, ""))
    assert run in recorded and not any(SECRET in text for text in (recorded, log.read_text(), again.read_text()))


@pytest.mark.slow(40)
def test_a_mistake_ends_the_job(user: Laptop, tiny: Tiny) -> None:
    wrong = user.run(*words(tiny, "name=wrong", "data.store=/nowhere/store", *on_ray(1)))
    assert wrong.returncode == 81, wrong
    assert "error: " in wrong.stdout and "/nowhere/store" in wrong.stdout, wrong
    assert "exit code 81 (invalid config or mesh): not started again" in wrong.stderr, wrong
    assert len(re.findall("starting again|attempt 2", wrong.stdout + wrong.stderr)) == 0, wrong


@pytest.mark.parametrize("chips", ["cpu:3", "v4:2x2x4", "v5e:2x4", "2xv5e:4x4", "v5p:4x4x4", "v6e:4x4", "tpu7x:2x2x1"])
def test_workers_have_all_chips_of_a_host(chips: str) -> None:
    """Ray accepts them, and counts as many slices."""
    from ray.train import ScalingConfig
    from ray.util.tpu import get_tpu_num_slices_for_workers

    told = scaling_of(PlaceOptions(kind="ray", accelerator=chips))
    scaling = ScalingConfig(**told)
    if chips.startswith("cpu"):
        assert scaling.total_resources == {"CPU": 3}
        return
    shape = chips.partition(":")[2].split("x")
    slices = int(chips[0]) if chips[0].isdigit() else 1
    assert scaling.total_resources["TPU"] == slices * math.prod(map(int, shape))
    found = get_tpu_num_slices_for_workers(
        told["topology"], told["accelerator_type"], told["num_workers"], told["resources_per_worker"]
    )
    assert found == slices


def test_workers_have_all_gpus_of_a_host() -> None:
    from ray.train import ScalingConfig

    scaling = ScalingConfig(**scaling_of(PlaceOptions(kind="ray", accelerator="h100:2x8")))
    assert (scaling.num_workers, scaling.total_resources["GPU"], scaling.accelerator_type) == (2, 16, "H100")


@pytest.mark.parametrize("broken", ["busy", "silent"])
def test_a_head_without_its_jobs_is_away(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server tells its version, and then that the rest is not there yet, or nothing."""
    over = threading.Event()

    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            knows = "version" in self.path
            if not knows and broken == "silent":
                over.wait(60)
            said = b'{"ray_version": "2.50.0", "version": "4"}' if knows else b"no agent"
            self.send_response(200 if knows else 503)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_: object) -> None: ...

    monkeypatch.setattr(ray_jobs, "_TIMEOUT_S", 0.5 if broken == "silent" else 60)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with raises(StorageError, f"{address} {'no answer' if broken == 'silent' else '503 no agent'}"):
            ray_jobs.RayJobs(address).call("list_jobs")
        over.set()
        server.shutdown()


def test_secrets_go_apart_from_their_key(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package alone does not tell them; without any, the same code is the same package."""
    bundle = make_bundle(ROOT).content
    key = write_package(bundle, {"TOKEN": SECRET}, tmp_path / "code.zip")
    with zipfile.ZipFile(tmp_path / "code.zip") as package:
        package.extractall(tmp_path / "code")
    assert (tmp_path / "code/jaxinfra/errors.py").read_bytes() == (ROOT / "jaxinfra/errors.py").read_bytes()
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "code").glob(".*") if path.is_file())
    monkeypatch.setenv("JAXINFRA_SECRETS_KEY", key)
    monkeypatch.delenv("TOKEN", raising=False)
    take_secrets(tmp_path / "code")
    assert os.environ.pop("TOKEN") == SECRET
    for name in ("one.zip", "two.zip"):
        assert write_package(bundle, {}, tmp_path / name) == ""
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_a_node_must_see_the_run_directory(tmp_path: Path) -> None:
    with raises(ConfigError, f"{tmp_path}/run root=gs://BUCKET/runs"):
        check_shared(f"{tmp_path}/run", 1)
    assert not (tmp_path / "run").exists()


def test_the_log_of_a_job_is_taken_apart() -> None:
    """A start again has other processes."""
    first, second = "(RayTrainWorker pid=7) ", "(RayTrainWorker pid=7, ip=10.0.0.2) "
    lines = ["driver", f"{first}[ray] this is rank 0", f"{second}[ray] this is rank 1", f"{second}b", f"{first}(a) c"]
    lines += ["(TrainController pid=3) noise", f"{second}[ray] this is rank 0", f"{second}again", "(raylet) died"]
    assert [*RankFilter(0).of_rank(lines)] == ["driver", "(a) c", "again", "(raylet) died"]
    assert [*RankFilter(1).of_rank(lines)] == ["b"]
