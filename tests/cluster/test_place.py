"""A place on Kubernetes says what its cluster says: what is refused, what waits and why, how it has ended."""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places import pod_log
from jaxinfra.launchers.places.cluster_api import Refused
from jaxinfra.launchers.places.job import Job
from jaxinfra.launchers.places.k8s import Cluster as Source
from jaxinfra.launchers.places.k8s import KubernetesPlace
from jaxinfra.launchers.places.manifests import name_of
from jaxinfra.launchers.places.place import PlaceOptions
from jaxinfra.launchers.places.ssh import MARK
from tests.cluster.objects import set_condition
from tests.cluster.server import Cluster
from tests.refusals import raises

OPTIONS = PlaceOptions(kind="k8s", accelerator="cpu:2", image="registry/story", workload="job")
JOB = Job(location="", command=["-m", "jaxinfra.cli"], folder=".", bundle="0", place=OPTIONS)


class World:
    """A cluster without nodes, and a place there."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.said = cluster, list[str]()
        self.job = replace(JOB, location=str(folder / "Story"))

    def place(self, **options: str) -> KubernetesPlace:
        self.job = replace(self.job, place=replace(OPTIONS, **options))
        made = KubernetesPlace(Source(self.job.place), self.said.append)
        made.hosts = made.source.current()
        return made

    def state(self, place: KubernetesPlace) -> tuple[int, str, int | None]:
        (state,) = place.watch(self.job).values()
        return state.attempt, state.state, state.code

    def end(self, plural: str, kind: str, reason: str, message: str = "") -> None:
        (found,) = self.cluster.find(plural)
        with self.cluster.lock:
            found["status"] = {}
            set_condition(found, kind, True, reason, message)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    with Cluster() as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
        yield World(cluster, tmp_path)


@pytest.mark.parametrize("workload", ["job", "jobset", "trainjob"])
def test_what_belongs_to_a_workload_goes_with_it(world: World, workload: str) -> None:
    place = world.place(workload=workload)
    place.prepare(world.job)
    assert not world.cluster.find("secrets"), "a check makes nothing"
    assert world.state(place) == (0, "none", None)
    place.start(world.job, 1)
    place.start(world.job, 1)  # by another machine, too
    (secret,) = world.cluster.find("secrets")
    (owner,) = secret["metadata"]["ownerReferences"]
    assert owner["name"] == name_of(world.job, 1) and secret["data"]["JAXINFRA_SECRET"]
    assert world.state(place) == (1, "live", None)
    place.stop(world.job, 1)
    for plural in (f"{workload}s", "secrets", "services", "trainingruntimes", "pods"):
        left = world.cluster.find(plural)
        for _ in range(100):
            with world.cluster.lock:
                if not (left := world.cluster.find(plural)):
                    break
            world.cluster.changed.acquire()
            world.cluster.changed.wait(0.1)
            world.cluster.changed.release()
        assert not left, plural
    assert world.state(place) == (1, "ended", 130) and "was deleted" in world.said[-1]


def test_the_end_of_a_run_is_that_of_its_workload(world: World) -> None:
    place = world.place(queue="")
    place.start(world.job, 1)
    world.end("jobs", "Failed", "DeadlineExceeded", "Job was active longer than specified deadline")
    assert world.state(place) == (1, "ended", 75)
    world.end("jobs", "Complete", "CompletionsReached")
    assert world.state(place) == (1, "ended", 0)


def test_a_cluster_that_is_away_is_no_end(world: World) -> None:
    place = world.place()
    place.start(world.job, 1)
    world.cluster.__exit__()
    assert world.state(place)[1] == "away" and "no answer" in world.said[-1]


def test_what_a_cluster_refuses_is_one_line(world: World, tmp_path: Path) -> None:
    world.cluster.add_queue("team")
    with raises(ConfigError, "--queue teem namespace default team"):
        world.place(queue="teem").prepare(world.job)
    for workload in ("job", "jobset", "trainjob"):
        with raises(ConfigError, "no namespace absent --namespace"):
            world.place(namespace="absent", workload=workload).prepare(world.job)
    world.cluster.denied.add("create jobs.batch")
    with raises(Refused, "jobs batch ask for the right"):
        world.place().prepare(world.job)
    world.cluster.denied.clear()
    world.cluster.installed = ()
    with raises(ConfigError, "no JobSet --kind job"):
        world.place(workload="jobset").prepare(world.job)
    with raises(ConfigError, "--context elsewhere"):
        world.place(context="elsewhere")
    world.cluster.token = "another"
    with raises(Refused, "Unauthorized sign in again"):
        world.place().prepare(world.job)
    for text in ("a: [", "[]", "no: clusters"):
        (tmp_path / "kubeconfig").write_text(text)
        with raises(ConfigError, "--place k8s: no cluster KUBECONFIG"):
            world.place()


def test_why_a_job_waits_is_said(world: World) -> None:
    world.cluster.add_queue("team")
    world.cluster.add_node("small", capacity={"pods": 0})
    queued = world.place(queue="team")
    queued.start(world.job, 1)
    assert world.state(queued)[1] == "live" and "waits in queue team" in world.said[-1]
    world.cluster.admit()
    for _ in range(100):
        world.state(queued)
        if "not scheduled" in world.said[-1]:
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert "0 of 2 pods" in world.said[-1] and "nodes are available" in world.said[-1]


class Printed:
    """A cluster in which the rank has printed five lines in two pods, and ends when it is asked again."""

    def __init__(self, *_: str) -> None:
        self.logs, self.asked = {"first": ["1", "2"], "other": ["9"], "second": ["3", "4", "5"]}, 0

    def path(self, *parts: str) -> str:
        return "/".join(parts)

    def list(self, path: str, **query: str) -> list[dict[str, Any]]:
        ranks = {"other": "1"}
        index = "batch.kubernetes.io/job-completion-index"
        return [
            {"metadata": {"name": name, "labels": {index: ranks.get(name, "0")}}, "status": {"phase": "Running"}}
            for name in self.logs
        ]

    def read(self, path: str) -> dict[str, Any]:
        self.asked += 1
        if self.asked == 2:
            self.logs["third"] = ["6"]
        return {"status": {"conditions": [{"type": "Complete", "status": str(self.asked > 1)}]}}

    def log(self, pod: str, *, follow: bool) -> Iterator[bytes]:
        return (f"{line}\n".encode() for line in self.logs[pod])


@pytest.mark.parametrize(
    ("lines", "follow", "shown"),
    [("+1", "no", "12345"), ("+4", "no", "45"), ("2", "no", "45"), ("9", "no", "12345"), ("2", "yes", "456")],
)
def test_a_log_is_that_of_all_pods_of_a_rank(
    lines: str, follow: str, shown: str, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(pod_log, "ClusterApi", Printed)
    monkeypatch.setattr(pod_log, "_POLL_S", 0.0)
    assert pod_log.main("", "", "jobs/a", "run=a", "0", "0", lines, follow) == 0
    assert capfdbinary.readouterr().out.removeprefix(MARK).decode().split() == [*shown]
