"""A run in MLflow, looked at through the API of a real server."""

from pathlib import Path

import pytest

from tests.servers.mlflow import mlflow_server
from tests.track import demo

pytest.importorskip("mlflow", reason="pip install mlflow-skinny")

RUN = """
import sys
from pathlib import Path
from jaxinfra.track.config import Mlflow, TrackConfig
from jaxinfra.track.tracker import make_trackers

run_dir, start_step, uri, status = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
config = TrackConfig(mlflow=Mlflow(uri=uri, experiment="words", tags=("team=speech",)), tensorboard=False)
with make_trackers(config, run_dir) as trackers:
    record = {"config": {"optim": {"peak_lr": 0.1}, "mesh": {"fsdp": start_step}}}
    trackers.start(record, {"parameters": (7, "count")}, start_step=start_step, total_steps=9)
    for step in range(start_step + 1, start_step + 4):
        trackers.log(step, {"loss": step / 4 if step > 1 else float("nan"), "rss_bytes": 1e9})
    trackers.log(step, {"eval/loss": 3.0})
    trackers.log_summary({"status": status})
"""


@pytest.mark.slow(40)
def test_a_run_and_its_resume_are_one_run_of_the_server(tmp_path: Path, monkeypatch) -> None:
    """The resume has another mesh, and MLflow refuses to change a parameter of a run."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run_dir, server_dir = tmp_path / "story", tmp_path / "server"
    server_dir.mkdir()
    with mlflow_server(server_dir) as uri:
        statuses = []
        for start_step, status in ((0, "stopped"), (2, "finished")):
            ended = demo.start(RUN, run_dir, start_step, uri, status)
            assert ended.returncode == 0, ended.stderr
            assert f"track.mlflow: {uri}/#/experiments/" in ended.stderr and "rows" not in ended.stderr
            (run,) = runs(uri)
            statuses.append(run.info.status)
        assert statuses == ["KILLED", "FINISHED"]
        assert run.info.run_name == "story" and run.data.tags["team"] == "speech"
        assert "| parameters | 7 | count |" in run.data.tags["mlflow.note.content"]
        assert run.data.params == {"optim.peak_lr": "0.1", "mesh.fsdp": "0"}
        assert run.data.metrics == {"train/loss": 1.25, "memory/rss_bytes": 1e9, "eval/loss": 3.0}
        assert {step for step, _ in history(uri, run.info.run_id)} == {1, 2, 3, 4, 5}


def runs(uri: str) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("words")
    return list(client.search_runs([experiment.experiment_id]))


def history(uri: str, run_id: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return [(each.step, each.value) for each in MlflowClient(uri).get_metric_history(run_id, "train/loss")]


@pytest.mark.slow(8)
def test_a_dead_server_is_named_and_training_goes_on(tmp_path: Path) -> None:
    ended = demo.start(RUN, tmp_path, 0, "http://127.0.0.1:9", "finished")
    assert ended.returncode == 0
    first, last = ended.stderr.splitlines()
    assert first.startswith("track.mlflow.uri=http://127.0.0.1:9: Connection refused; training goes on")
    assert "4 of 4 logged rows were not sent" in last
