"""A run in MLflow, looked at through the API of a real server."""

import json
import urllib.parse
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.servers.mlflow import mlflow_server
from tests.track import demo

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="pip install mlflow-skinny")

RUN = """
import sys
from pathlib import Path
from jaxinfra.track.config import Mlflow, TrackConfig
from jaxinfra.track.tracker import make_trackers

run_dir, uri = Path(sys.argv[1]), sys.argv[2]
config = TrackConfig(mlflow=Mlflow(uri=uri, experiment="words", tags=("team=speech",)), tensorboard=False)
for start_step, status in (0, "finished"), (2, "stopped"):
    with make_trackers(config, run_dir) as trackers:
        record = {"config": {"optim": {"peak_lr": 0.1}, "mesh": {"fsdp": start_step}}}
        trackers.start(record, {"parameters": (7, "count")}, start_step=start_step, total_steps=9)
        for step in range(start_step + 1, start_step + 4):
            trackers.log(step, {"loss": step / 4 if step > 1 else float("nan"), "rss_bytes": 1e9})
        trackers.log(step, {"eval/loss": 3.0})
        trackers.log_sample(step, "Once upon")
        trackers.log_summary({"status": status})
"""


def ask(uri: str, method: str, **question: Any) -> Any:
    """Calls the server's API."""
    body = json.dumps(question).encode() if method == "runs/search" else None
    query = "" if body else "?" + urllib.parse.urlencode(question)
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/{method}{query}", body, {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=30))


def pairs(listed: list[dict[str, Any]]) -> dict[str, Any]:
    return {each["key"]: each["value"] for each in listed}


@pytest.mark.slow(30)
def test_a_run_and_its_resume_are_one_run_of_the_server(tmp_path: Path) -> None:
    """The resume has another mesh, and MLflow refuses to change a parameter of a run."""
    run_dir, server_dir = tmp_path / "story", tmp_path / "server"
    server_dir.mkdir()
    with mlflow_server(server_dir) as uri:
        ended = demo.start(RUN, run_dir, uri)
        assert ended.returncode == 0 and "not sent" not in ended.stderr, ended.stderr
        experiment = ask(uri, "experiments/get-by-name", experiment_name="words")["experiment"]["experiment_id"]
        (run,) = ask(uri, "runs/search", experiment_ids=[experiment])["runs"]
        run_id = run["info"]["run_id"]
        named = [line for line in ended.stderr.splitlines() if line.startswith("track.mlflow")]
        assert named == [f"track.mlflow: {uri}/#/experiments/{experiment}/runs/{run_id}"] * 2, ended.stderr
        assert (run["info"]["run_name"], run["info"]["status"]) == ("story", "KILLED")
        tags = pairs(run["data"]["tags"])
        assert tags["team"] == "speech" and "| parameters | 7 | count |" in tags["mlflow.note.content"]
        assert tags["sample"] == "after step 5\nOnce upon"
        assert pairs(run["data"]["params"]) == {"optim.peak_lr": "0.1", "mesh.fsdp": "0"}
        assert pairs(run["data"]["metrics"]) == {"train/loss": 1.25, "memory/rss_bytes": 1e9, "eval/loss": 3.0}
        losses = ask(uri, "metrics/get-history", run_id=run_id, metric_key="train/loss")["metrics"]
        assert {loss["step"] for loss in losses} == {1, 2, 3, 4, 5}


@pytest.mark.slow(8)
def test_a_dead_server_is_named_and_training_goes_on(tmp_path: Path) -> None:
    ended = demo.start(RUN, tmp_path, "http://127.0.0.1:9")
    assert ended.returncode == 0
    lines = [line for line in ended.stderr.splitlines() if line.startswith("track.mlflow")]
    lost = [line for line in lines if "5 of 5 logged rows were not sent" in line]
    begin = "track.mlflow.uri=http://127.0.0.1:9: Connection refused; training goes on"
    refused = [line for line in lines if line.startswith(begin)]
    assert len(lost) == 2 and len(lines) == len(lost) + len(refused), "a run and its resume: " + ended.stderr
    in_time = [line for line in lost if "within" not in line]  # a slow machine may still import MLflow at the end
    assert len(refused) >= len(in_time), ended.stderr
