"""A run in MLflow, looked at through the API of a real server."""

import json
import shlex
import signal
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import StorageError
from jaxinfra.track import remote
from jaxinfra.track.config import Mlflow, TrackConfig
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.track.tracker import make_trackers
from tests.refusals import refused
from tests.servers.faulty_proxy import Faults, faulty
from tests.servers.guard import wait_until
from tests.servers.mlflow import mlflow_server
from tests.tiny_run import Tiny, ended, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture
def away(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Faults]]:
    """The server behind a proxy that can take it away: its address there, and the faults. Waits are short."""
    monkeypatch.setattr(remote, "_FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(remote, "_MAX_RETRY_S", 0.1)
    monkeypatch.setattr(remote, "_SEND_EVERY_S", 0.0)
    monkeypatch.setattr(remote, "CLOSE_S", 600.0)
    with faulty(int(server.rpartition(":")[2])) as (port, faults):
        yield f"http://127.0.0.1:{port}", faults


def steps(server: str, run_dir: Path, name: str) -> Counter[int]:
    """How often the server has each step of a metric."""
    run_id = json.loads((run_dir / "mlflow.json").read_text())["id"]
    return Counter(
        each["step"] for each in ask(server, "metrics/get-history", run_id=run_id, metric_key=name).get("metrics", [])
    )


def check_complete(server: str, run_dir: Path, status: str) -> None:
    """The server has each logged loss once, and how the run ended."""
    rows = read_metrics(run_dir / "metrics.jsonl")
    for group, name in ("train/", "loss"), ("", "eval/loss"):
        assert steps(server, run_dir, group + name) == {int(row["step"]): 1 for row in rows if name in row}, name
    run_id = json.loads((run_dir / "mlflow.json").read_text())["id"]
    info = ask(server, "runs/get", run_id=run_id)["run"]["info"]
    assert info["status"] == status and info["start_time"] <= info["end_time"]


@pytest.mark.slow(30)
def test_a_run_and_its_resume_are_one_run_of_the_server(server: str, tmp_path: Path) -> None:
    """The resume has another mesh, and MLflow refuses to change a parameter of a run."""
    ended = demo.start(RUN, tmp_path / "story", server)
    assert ended.returncode == 0 and "not sent" not in ended.stderr, ended.stderr
    experiment = ask(server, "experiments/get-by-name", experiment_name="words")["experiment"]["experiment_id"]
    (run,) = ask(server, "runs/search", experiment_ids=[experiment])["runs"]
    run_id = run["info"]["run_id"]
    named = [line for line in ended.stderr.splitlines() if line.startswith("track.mlflow")]
    assert named == [f"track.mlflow: {server}/#/experiments/{experiment}/runs/{run_id}"] * 2, ended.stderr
    assert (run["info"]["run_name"], run["info"]["status"]) == ("story", "KILLED")
    tags = pairs(run["data"]["tags"])
    assert tags["team"] == "speech" and "| parameters | 7 | count |" in tags["mlflow.note.content"]
    assert tags["sample"] == "after step 5\nOnce upon"
    assert pairs(run["data"]["params"]) == {"optim.peak_lr": "0.1", "mesh.fsdp": "0"}
    assert pairs(run["data"]["metrics"]) == {"train/loss": 1.25, "memory/rss_bytes": 1e9, "eval/loss": 3.0}
    losses = ask(server, "metrics/get-history", run_id=run_id, metric_key="train/loss")["metrics"]
    assert sorted(loss["step"] for loss in losses) == [1, 2, 3, 4, 5], "step 3 was made twice, with the same loss"


@pytest.mark.slow(3)
def test_a_server_that_goes_away_in_mid_run_gets_each_row_once(away, server, tmp_path, capsys) -> None:
    uri, faults = away
    lines: list[str] = []

    def printed() -> list[str]:
        """The lines of the tracker after the first, which says where the run is."""
        lines.extend(line for line in capsys.readouterr().err.splitlines() if line.startswith("track.mlflow"))
        return lines[1:]

    config = TrackConfig(mlflow=Mlflow(uri=uri), tensorboard=False, console="plain")
    with make_trackers(config, tmp_path) as trackers:
        trackers.start({"config": {}}, {}, start_step=0, total_steps=9)
        for step in range(1, 10):
            if step == 4:
                wait_until(
                    lambda: steps(server, tmp_path, "train/loss")[3] or 1 / 0, (Exception,), tmp_path / "log", 600
                )
                faults.down = True
            if step == 7:
                wait_until(lambda: printed() or 1 / 0, (ZeroDivisionError,), tmp_path / "log", 600)
                faults.down = False
            trackers.log(step, {"loss": float(step)})
        trackers.log_summary({"status": "finished"})
    away_line, back_line = printed()
    assert away_line.startswith(f"track.mlflow.uri={uri}: Connection reset") and "training goes on" in away_line
    assert "back after" in back_line and "sent late" in back_line
    check_complete(server, tmp_path, "FINISHED")


@pytest.mark.slow(10)
def test_a_server_that_is_away_at_the_end_gets_the_rest_at_the_next_start(away, server, tiny: Tiny, caplog) -> None:
    uri, faults = away
    run_dir, words = tiny.directory(), (f"track.mlflow.uri={uri}",)
    faults.after = lambda path: setattr(faults, "down", faults.down or path.endswith("runs/log-batch"))
    lost = tiny.launch(*words)
    assert lost.code == 0 and f"runs sync {run_dir}" in caplog.text and "not sent" in caplog.text, lost
    refused(launch("runs", "sync", str(run_dir)), f"track.mlflow.uri={uri}", code=StorageError.exit_code)
    faults.clear()
    again = tiny.launch(*words)
    assert again.code == 0 and "sent late" in again.err, again
    check_complete(server, run_dir, "FINISHED")
    synced = launch("runs", "sync", str(run_dir))
    assert synced.code == 0 and "sent late" not in synced.err and "has all" in synced.err, synced
    check_complete(server, run_dir, "FINISHED")


@pytest.mark.slow(10)
def test_a_finished_run_is_sent_to_a_server_that_it_did_not_name(away, server, tiny: Tiny, caplog) -> None:
    """The line that a start prints while the server is away works when it answers."""
    uri, faults = away
    run_dir, words = tiny.directory(), (f"track.mlflow.uri={uri}", "track.mlflow.tags=team=speech,", "train.steps=2")
    assert tiny.launch(*words[2:], "name=tiny").code == 0
    faults.down = True
    again = tiny.launch(*words, "name=tiny")
    assert again.code == 0 and f"asking uri={uri}" in again.out, again
    line = next(text for text in caplog.messages if "runs sync" in text)
    printed = shlex.split(line.partition("launch ")[2])
    refused(launch(*printed), shlex.join(printed), code=StorageError.exit_code)
    faults.clear()
    synced = launch(*printed)
    assert synced.code == 0 and "has all" in synced.err, synced
    check_complete(server, run_dir, "FINISHED")


@pytest.mark.slow(20)
def test_a_killed_run_gets_its_end_by_sync_and_goes_on_as_the_same_run(server: str, tiny: Tiny) -> None:
    """Steps 6 to 9 are made twice: the server has their losses already."""
    run_dir, words = tiny.directory(), (f"track.mlflow.uri={server}",)
    fail = {"JAXINFRA_FAIL": "log:0:9:sleep=8,log:0:10:kill"}
    assert ended(tiny.start(*words, devices=8, env=fail)).code == -signal.SIGKILL
    synced = launch("runs", "sync", str(run_dir))
    assert synced.code == 0 and "has all" in synced.err, synced
    check_complete(server, run_dir, "KILLED")
    assert tiny.launch(*words).code == 0
    check_complete(server, run_dir, "FINISHED")


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
