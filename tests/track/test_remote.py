"""Training goes on when the server of a tracker is slow, dead or refuses. The servers here are fakes."""

import errno
import math
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxinfra import packages
from jaxinfra.errors import ConfigError, RunInUseError, StorageError
from jaxinfra.track import remote
from jaxinfra.track.config import Mlflow, TrackConfig, Wandb
from jaxinfra.track.jsonl import JsonlTracker
from jaxinfra.track.remote import RemoteRun, RemoteTracker, remote_id
from jaxinfra.track.tracker import MultiTracker, make_trackers
from tests.refusals import names, problem, raises

DOCS = Path(__file__).parents[2] / "docs"


class Server(RemoteRun):
    """Fails with each of `errors` first; while it is not `open`, its calls do not return."""

    def __init__(self, *errors: Exception, is_open: bool = True) -> None:
        self.errors, self.open = list(errors), threading.Event()
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.status = ""
        if is_open:
            self.open.set()

    def answer(self) -> None:
        self.open.wait(20)
        if self.errors:
            raise self.errors.pop(0)

    def start(self, record, statistics) -> str:
        self.answer()
        return "http://server/run"

    def send(self, rows) -> None:
        self.answer()
        self.rows += [(row.step, dict(row.metrics)) for row in rows]

    def finish(self, status, summary, end_ms=None) -> None:
        self.answer()
        self.status = status


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(remote, "_SEND_EVERY_S", 0.0)


def log(tracker: RemoteTracker, steps: int) -> None:
    for step in range(1, steps + 1):
        tracker.log(step, {"loss": float(step)})


def started(server: Server, *, announce: bool = False) -> RemoteTracker:
    tracker = RemoteTracker(server, "track.server", "uri=here", announce=announce)
    tracker.start({}, {}, start_step=0, total_steps=9)
    return tracker


def test_rows_arrive_in_order_and_in_groups(caplog, capsys) -> None:
    server = Server()
    tracker = started(server, announce=True)
    tracker.log(1, {"loss": 2.0, "mfu": 0.5, "rss_bytes": 7.0, "tokens_per_s": 9.0, "eval/loss": 3.0})
    log(tracker, 200)
    tracker.log_summary({"status": "stopped"})
    tracker.close()
    first, *rest = server.rows
    named = {"train/loss": 2.0, "perf/mfu": 0.5, "memory/rss_bytes": 7.0, "perf/tokens_per_s": 9.0, "eval/loss": 3.0}
    assert first == (1, named)
    assert rest == [(step, {"train/loss": float(step)}) for step in range(1, 201)]
    assert server.status == "stopped" and not caplog.records
    assert capsys.readouterr().err == "track.server: http://server/run\n"


def test_an_outage_loses_nothing_and_is_reported_once_without_secrets(caplog, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-key-that-is-never-shown")
    server = Server(OSError("a-key-that-is-never-shown is refused"), OSError("down"), OSError("down"))
    tracker = started(server, announce=True)
    log(tracker, 3)
    while server.errors:
        time.sleep(0.01)
    tracker.log_summary({"status": "finished"})
    tracker.close()
    assert [step for step, _ in server.rows] == [1, 2, 3] and server.status == "finished"
    away, _, back = capsys.readouterr().err.splitlines()
    assert away.startswith("track.server.uri=here: $WANDB_API_KEY is refused; training goes on")
    assert back.startswith("track.server: back after ") and back.endswith(" s, 3 rows sent late")
    assert not caplog.records


class Asked(Server):
    """Says what it has. An error comes after it has taken the rows: their answer is lost."""

    def start(self, record, statistics) -> str:
        return "http://server/run"

    def send(self, rows) -> None:
        self.rows += [(row.step, dict(row.metrics)) for row in rows]
        self.answer()

    def points(self):
        return [(name, step, value) for step, metrics in self.rows for name, value in metrics.items()]


def test_a_request_whose_answer_is_lost_is_not_repeated(capsys) -> None:
    server = Asked(ValueError("aborted", OSError(errno.ECONNRESET, "Connection reset by peer")))
    tracker = started(server)
    log(tracker, 3)
    while server.errors:
        time.sleep(0.01)
    tracker.log(4, {"loss": 4.0})
    tracker.close()
    assert [step for step, _ in server.rows] == [1, 2, 3, 4]
    assert "track.server.uri=here: Connection reset by peer; " in capsys.readouterr().err, "the cause, not its wrapping"


def test_the_next_start_sends_what_the_server_lacks(tmp_path: Path, capsys) -> None:
    """Step 4 is made again with the same loss, step 5 with another one; MLflow keeps an infinity as a number."""
    values = {1: math.nan, 2: math.inf, 3: 3.0, 4: 4.0}
    files = JsonlTracker(tmp_path)
    files.start({}, {}, start_step=0, total_steps=9)
    for step, value in values.items():
        files.log(step, {"loss": value})
    files.close()
    server = Asked()
    server.rows = [(1, {"train/loss": math.nan}), (2, {"train/loss": sys.float_info.max}), (4, {"train/loss": 4.0})]
    server.rows += [(5, {"train/loss": 5.0})]
    tracker = RemoteTracker(server, "track.server", "uri=here", run_dir=tmp_path, sync_command="runs sync runs/x")
    tracker.start({}, {}, start_step=3, total_steps=9)
    for step, value in (4, 4.0), (5, 5.5):
        tracker.log(step, {"loss": value})
    tracker.close()
    assert server.rows[4:] == [(3, {"train/loss": 3.0}), (5, {"train/loss": 5.5})]
    assert capsys.readouterr().err.splitlines() == ["track.server: http://server/run", "track.server: 1 row sent late"]


def test_an_end_that_the_server_has_not_confirmed_is_told(caplog, tmp_path: Path) -> None:
    server = Asked()
    tracker = RemoteTracker(server, "track.server", "uri=here", run_dir=tmp_path, sync_command="runs sync runs/x")
    tracker.start({}, {}, start_step=0, total_steps=9)
    tracker.log(1, {"loss": 1.0})
    while not server.rows:
        time.sleep(0.01)
    server.errors = [OSError("down")]
    tracker.log_summary({"status": "finished"})
    tracker.close()
    names(caplog.messages[0], "track.server end confirmed (down) runs sync runs/x")


def test_a_dead_server_holds_up_neither_steps_nor_the_end(caplog, monkeypatch) -> None:
    monkeypatch.setattr(remote, "CLOSE_S", 0.1)
    server = Server(is_open=False)
    tracker = started(server)
    log(tracker, 5)
    tracker.close()
    assert "track.server: 5 of 5 logged rows were not sent within" in caplog.text
    server.open.set()


def test_the_queue_is_bounded_and_drops_the_oldest(caplog, monkeypatch) -> None:
    monkeypatch.setattr(remote, "_MAX_ROWS", 10)
    server = Server(is_open=False)
    tracker = started(server)
    log(tracker, 25)
    server.open.set()
    tracker.close()
    assert [step for step, _ in server.rows] == list(range(16, 26))
    assert "15 of 25 logged rows were not sent" in caplog.text


def test_an_error_that_ends_the_run_ends_the_remote_run_as_failed() -> None:
    server = Server()
    with pytest.raises(KeyError), MultiTracker([started(server)]):
        raise KeyError("of the run")
    assert server.status == "failed"


def test_a_run_that_another_start_has_taken_over_goes_on_remotely() -> None:
    server = Server()
    with pytest.raises(RunInUseError), MultiTracker([tracker := started(server)]):
        raise RunInUseError("taken over")
    assert tracker._thread is not None
    tracker._thread.join(600)
    assert not tracker._thread.is_alive() and server.status == ""


def test_the_id_of_a_remote_run_is_kept_for_its_target(tmp_path: Path) -> None:
    path = tmp_path / "server.json"
    assert remote_id(path, "here", lambda key: "1") == "1"
    assert remote_id(path, "here", lambda key: "2") == "1"
    assert remote_id(path, "there", lambda key: "3") == "3"
    path.write_text("{")
    with raises(StorageError, f"{path}"):
        remote_id(path, "here", lambda key: "4")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (Mlflow(uri="localhost:5000"), "uri=localhost:5000 use uri=http://127.0.0.1:5000"),
        (Mlflow(uri="http://me:secret-word@host"), "uri= *** environment"),
        (Mlflow(uri="http://host", tags=("team",)), "tags NAME=VALUE"),
        (Wandb(project="team/project"), "project=team/project use project=my-project entity="),
        (Wandb(project=""), "project use"),
    ],
)
def test_a_wrong_address_is_refused(config: Mlflow | Wandb, named: str) -> None:
    assert "secret-word" not in problem(config, named)


def test_a_missing_package_is_named_before_the_run_starts(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    for config, name in (
        (TrackConfig(wandb=Wandb(project="p")), "wandb"),
        (TrackConfig(mlflow=Mlflow(uri="x")), "mlflow"),
    ):
        with raises(ConfigError, f"track.{name} pip install 'jaxinfra[{name}]'"):
            make_trackers(config, tmp_path)
        assert f"`pip install 'jaxinfra[{name}]'`" in (DOCS / "watch.md").read_text()
