"""The life of a run on a cluster: queued, trained, evicted, its node lost, stopped; its losses have the same bits."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client, config

from tests.cloud.hosts import Hosts
from tests.cloud.laptop import power_off, until
from tests.cloud.test_life import CALM, QUICK, World
from tests.cluster.server import Cluster
from tests.servers.fixtures import Server

IMAGE = "registry.example/life:1"


@pytest.fixture(scope="module")
def world(s3_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Hosts() as hosts:
        yield World(hosts, {}, s3_server, tmp_path_factory.mktemp("world"))


@pytest.mark.slow(90)
def test_life(world: World, tmp_path: Path) -> None:
    with Cluster(world.hosts) as cluster:
        for name in ("one", "two"):
            cluster.add_node(name)
        cluster.add_queue("team")
        cluster.images[IMAGE] = []
        kubeconfig = cluster.kubeconfig(tmp_path / "kubeconfig")
        core = client.CoreV1Api(config.new_client_from_config(str(kubeconfig)))
        laptop, log = world.laptop(KUBECONFIG=str(kubeconfig)), tmp_path / "life.log"
        run = f"{world.bucket}/runs/on-cluster"

        def says(text: str) -> bool:
            return log.exists() and text in log.read_text(errors="replace")

        def starts() -> int:
            return len(re.findall(r"^(?:new run|resuming) ", log.read_text(errors="replace"), re.MULTILINE))

        def step() -> int:
            """Returns how many steps the newest start has shown."""
            newest = re.split(r"^(?:new run|resuming) ", log.read_text(errors="replace"), flags=re.MULTILINE)[-1]
            return len(re.findall(r"^step +\d+/\d+ +loss", newest, re.MULTILINE))

        def nodes() -> list[str]:
            return [pod["spec"]["nodeName"] for pod in cluster.find("pods") if pod["status"]["phase"] == "Running"]

        words = ["life.py", "name=on-cluster", "--place", "k8s", "--accelerator", "cpu:2", "--heartbeat-timeout", "10"]
        words += ["--image", IMAGE, "--queue", "team", "--secret", "AWS_SECRET_ACCESS_KEY", "--devices", "cpu:1"]
        told = {**world.told, **QUICK, **CALM}
        process = laptop.start(*words, *(word for each in told.items() for word in ("--env", "=".join(each))), log=log)
        try:
            until(lambda: says("waits in queue team"), "waiting", process, log)
            cluster.admit()
            until(lambda: step() > 8, "training", process, log)

            index = "batch.kubernetes.io/job-completion-index"
            (first,) = [
                pod["metadata"]["name"] for pod in cluster.find("pods") if pod["metadata"]["labels"][index] == "0"
            ]
            eviction = client.V1Eviction(metadata=client.V1ObjectMeta(name=first))
            core.create_namespaced_pod_eviction(first, "default", eviction)
            until(lambda: step() > 8 and says(f"resuming {run}"), "training after an eviction", process, log)

            cluster.add_node("three")
            cluster.lose_node(nodes()[0])
            until(lambda: step() > 8 and starts() == 3, "training without a node", process, log)

            lines = laptop.run("runs", "logs", run, "--lines", "5")
            assert not lines.returncode and len(lines.stdout.splitlines()) == 5, lines.stderr
            stopped = laptop.run("runs", "stop", run)
            assert not stopped.returncode, stopped.stderr
            assert process.wait(60) == 75, log.read_text()
        finally:
            power_off(process)
        left = [plural for plural in ("pods", "jobs", "jobsets", "services", "secrets") if cluster.find(plural)]
        assert not left, "what belongs to a run goes with it"
    losses = world.losses("on-cluster")
    reference = world.reference(max(losses), 2)
    assert losses == {step: reference[step] for step in range(1, max(losses) + 1)}
