"""The whole life of a run on a cloud: made, trained, preempted, made again, stopped, deleted; nothing is left."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.cloud.hosts import Hosts
from tests.cloud.laptop import Laptop, power_off, until
from tests.cloud.packages import PackageServer
from tests.cloud.server import Cloud
from tests.servers.fixtures import BUCKET, Server
from tests.servers.seaweed import ACCESS_KEY, REGION, SECRET_KEY

GOLDEN = Path(__file__).parents[1] / "golden" / "cloud"
STEPS = 4000  # more than a life has time for: the user stops it
PLACES = {"tpu-vm": ("v6e-16", "us-east5-b", 4), "gce": ("v5p:2x2x2", "us-east5-a", 2)}  # chips, zone, hosts
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
CALM = {"JAXINFRA_FAIL": "step:*:*:sleep=0.2"}
"""A step waits: else the cores are busy with training while the cloud and who watches it have their turn."""
SHARED = {  # what hosts install lies on their shared disk: on two cores, four would unpack it for a minute
    "UV_CACHE_DIR": "/shared/uv",
    "UV_LINK_MODE": "symlink",
    "PYTHONPYCACHEPREFIX": "/shared/pyc",
}


class World:
    """Machines, packages, and a bucket with a user's data, for several lives; laptops know where all that is."""

    def __init__(self, hosts: Hosts, packages: Mapping[str, str], server: Server, folder: Path) -> None:
        self.hosts, self.server, self.folder = hosts, server, folder
        self.bucket = f"{server.scheme}://{BUCKET}/cloud"  # the name is in the requests on record
        port = int(server.environment["AWS_ENDPOINT_URL_S3"].rpartition(":")[2])
        self.told = {  # to hosts, by --env
            "AWS_ENDPOINT_URL_S3": f"http://{hosts.gateway}:{hosts.forward(port)}",
            "AWS_REGION": REGION,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            **packages,
        }
        self._laptops = 0
        self._first = self.laptop()
        self._first.checkout(self.bucket, STEPS)
        prepared = self._first.run("data", "prepare", "life.py")
        assert not prepared.returncode, prepared.stderr

    def laptop(self, **environment: str) -> Laptop:
        """Returns a machine that another user, or the same, has just unpacked, in the first one's checkout."""
        self._laptops += 1
        environment = {**self.told, **QUICK, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, **environment}
        return Laptop(self.folder / f"laptop-{self._laptops}", environment, project=self.folder / "project")

    def losses(self, name: str) -> dict[int, str]:
        """Returns the loss of each logged step of a run, with all its digits; the last of several counts."""
        found: dict[int, str] = {}
        for part in ("", *(f".{number}" for number in range(1, 50))):
            try:
                text = self.server.get(f"{self.bucket}/runs/{name}/metrics.jsonl{part}").decode()
            except Exception as error:  # botocore makes its classes when it runs
                assert "NoSuchKey" in str(error), error
                break
            rows = [json.loads(line) for line in text.splitlines()]
            found |= {row["step"]: json.dumps(row["loss"]) for row in rows if "loss" in row}
        return found

    def last_step(self, name: str) -> int:
        """Returns the last logged step, 0 before the first."""
        return max(self.losses(name), default=0)

    def reference(self, steps: int, processes: int) -> Mapping[int, str]:
        """Returns the losses of the same run with as many processes, without a cloud or an interruption."""
        name = f"reference-{processes}"
        if self.last_step(name) < steps:
            steps = max(steps, 100)  # enough for the other lives, too
            log = self.folder / f"{name}.log"
            words = ("life.py", f"name={name}", "--processes", str(processes), "--devices", f"cpu:{processes}")
            process = self.laptop().start(*words, log=log)
            until(lambda: self.last_step(name) >= steps, "the reference", process, log)
            power_off(process)
        return self.losses(name)


@pytest.fixture(scope="module")
def world(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Hosts() as hosts, PackageServer(hosts.gateway) as packages:
        yield World(hosts, packages.environment, s3_server, tmp_path_factory.mktemp("world"))


class Life:
    """A run, its cloud, and the log of who looks after it."""

    def __init__(self, world: World, cloud: Cloud, name: str) -> None:
        self.world, self.cloud, self.name = world, cloud, name
        self.run, self.log = f"{world.bucket}/runs/{name}", world.folder / f"{name}.log"
        self._commands: list[subprocess.Popen[bytes]] = []
        self.endpoint = f"http://{world.hosts.gateway}:{world.hosts.forward(cloud.port)}"

    def laptop(self) -> Laptop:
        """Returns a new machine of a user."""
        return self.world.laptop(JAXINFRA_GOOGLE_ENDPOINT=self.endpoint, GOOGLE_CLOUD_PROJECT=self.cloud.project)

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """Starts a command on a new machine of a user."""
        self._commands.append(self.laptop().start(*words, log=self.log))
        return self._commands[-1]

    def end(self) -> None:
        """Ends what a test has left."""
        for command in self._commands:
            power_off(command)
        for machine in self.cloud.hosts():
            machine.delete()

    def start(self, kind: str, *options: str) -> list[str]:
        """Returns the words of a start."""
        words = [
            "life.py",
            f"name={self.name}",
            "train.compile_cache=/shared/compiled",
            "--name",
            self.name,
        ]
        chips, zone, _ = PLACES[kind]
        words += ["--place", kind, "--create", chips, "--zone", zone]
        words += ["--devices", "cpu:1", "--secret", "AWS_SECRET_ACCESS_KEY", *options]
        told = {**self.world.told, **QUICK, **CALM, **SHARED}
        return [*words, *(word for each in told.items() for word in ("--env", "=".join(each)))]

    @property
    def last_step(self) -> int:
        """The last logged step."""
        return self.world.last_step(self.name)

    def says(self, text: str) -> bool:
        """Whether the log has this."""
        return self.log.exists() and text in self.log.read_text(errors="replace")


@pytest.fixture
def life(world: World, request: pytest.FixtureRequest) -> Iterator[Life]:
    with Cloud(world.hosts, delay_s=0.2) as cloud:
        name = request.node.name.replace("test_", "").translate(str.maketrans("[_", "--", "]"))
        life = Life(world, cloud, name)
        try:
            yield life
        finally:
            life.end()


@pytest.mark.slow(90)
@pytest.mark.parametrize("kind", PLACES)
def test_life(life: Life, kind: str) -> None:
    """On Compute Engine the launching machine dies in the middle, and another one takes over."""
    cloud, (_, zone, hosts) = life.cloud, PLACES[kind]
    cloud.stockout(zone)
    process = life.begin(*life.start(kind, "--spot"))
    until(lambda: life.last_step > 8, "training", process, life.log)
    assert life.says("waiting for resources" if kind == "tpu-vm" else "ZONE_RESOURCE_POOL"), life.log.read_text()

    if kind == "gce":
        power_off(process)
    cloud.preempt(life.name, after_s=2.0)
    if kind == "gce":
        process = life.begin("runs", "resume", life.run)
    until(lambda: life.says(f"resuming {life.run}"), "going on", process, life.log)
    resumed = int(life.log.read_text().rpartition(f"resuming {life.run} at step ")[2].split()[0])
    until(lambda: life.last_step > resumed + 8, "training again", process, life.log)

    other = life.laptop()
    logs = other.run("runs", "logs", life.run, "--lines", "5")
    assert not logs.returncode and len(logs.stdout.splitlines()) == 5, logs.stderr
    logs = other.run("runs", "logs", life.run, "--rank", str(hosts - 1))
    assert not logs.returncode and "rank 0 prints for all" in logs.stderr, logs.stderr
    stopped = other.run("runs", "stop", life.run, *(["--kill"] if kind == "gce" else []))
    assert not stopped.returncode, stopped.stderr
    assert process.wait(60) == 75, life.log.read_text()
    assert cloud.remaining() == [] and cloud.hosts() == []

    losses = life.world.losses(life.name)
    reference = life.world.reference(max(losses), hosts)
    assert losses == {step: reference[step] for step in range(1, max(losses) + 1)}
    check_golden(life, kind)


@pytest.mark.slow(40)
def test_ends_when_everybody_has_gone(life: Life) -> None:
    """The host itself deletes what was made, when the hours are over, by its service account."""
    cloud = life.cloud
    cloud.rights[cloud.service_account] = {"tpu.nodes.*", "tpu.operations.*"}
    words = [*life.start("tpu-vm"), "--create", "v6e-8", "--max-hours", "0.005", "--detach"]
    process = life.begin(*words)
    until(lambda: life.says("watches it, and makes lost hosts again"), "starting", process, life.log)
    assert process.wait(60) == 0 and cloud.remaining() != []
    waiting = life.begin("runs", "logs", life.run, "--follow")
    until(lambda: cloud.remaining() == [], "the end of what costs", waiting, life.log)
    deletions = [path for method, path, _ in cloud.log if method == "DELETE"]
    assert len(deletions) == 1 and cloud.hosts() == []


def check_golden(life: Life, kind: str) -> None:
    """Compares all requests with those on record; WRITE_GOLDEN=1 records them."""
    asked = life.cloud.golden({life.endpoint: "ENDPOINT", life.world.bucket: "BUCKET"}).strip().split("\n\n")
    reads = sorted({each for each in asked if each.startswith("GET ") or "listManagedInstances" in each})
    changes = [each for each in asked if each not in reads]  # in their order; how often is read is up to the clock
    text = "\n\n".join(["# reads", *reads, "# changes", *changes, ""])
    path = GOLDEN / f"{kind}.txt"
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
