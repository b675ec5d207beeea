import json

import pytest

from jaxinfra.errors import RunInUseError
from jaxinfra.storage import lease
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.jsonl import JsonlTracker, read_metrics
from jaxinfra.track.memory import rss_bytes
from jaxinfra.track.tracker import MultiTracker, make_trackers
from tests.refusals import problem
from tests.tiny_run import contents
from tests.track import demo
from tests.track.test_report import record


class Noting:
    """A tracker that notes each call, and raises in `close` or `log` what it is given."""

    def __init__(self, name, notes, close=None, log=None):
        self.name, self.notes, self.errors = name, notes, {"close": close, "log": log}

    def note(self, call):
        self.notes.append(f"{self.name}.{call}")
        if error := self.errors.get(call):
            raise error

    def start(self, record, statistics, *, start_step, total_steps):
        self.note("start")

    def log(self, step, metrics):
        self.note("log")

    def log_summary(self, values):
        self.note("summary")

    def close(self):
        self.note("close")


def test_calls_keep_the_order_and_all_close_though_one_raises(caplog):
    notes: list[str] = []
    first, second = ValueError("first"), ValueError("second")
    trackers = MultiTracker(
        [Noting("a", notes), Noting("b", notes, first), Noting("c", notes, second), Noting("d", notes)]
    )
    trackers.start({}, {}, start_step=0, total_steps=1)
    trackers.log(0, {"loss": 1.0})
    trackers.log_summary({})
    with pytest.raises(ValueError, match="first"):
        trackers.close()
    assert notes == [f"{name}.{call}" for call in ("start", "log", "summary", "close") for name in "abcd"]
    assert "second" in caplog.text


def test_the_error_of_the_run_is_not_replaced_by_one_of_a_tracker(caplog):
    with pytest.raises(KeyError), MultiTracker([Noting("a", [], ValueError("closing"))]):
        raise KeyError("of the run")
    assert "closing" in caplog.text


@pytest.mark.parametrize("error", [None, ValueError("a bug"), RunInUseError("taken over")], ids=str)
def test_a_start_that_has_lost_its_run_writes_nothing(tmp_path, monkeypatch, error):
    """It was stopped while another start has trained to the end."""
    monkeypatch.setattr(lease, "_process_identity", lambda pid: "")
    (tmp_path / "run.json").write_text(json.dumps(record()))
    config = TrackConfig(tensorboard=False, console="off")
    with lease.hold(tmp_path, beat_s=1000) as old_lease:
        old = make_trackers(config, tmp_path, check=old_lease.check_now)
        old.start({}, {}, start_step=0, total_steps=9)
        old.log(5, {"loss": 1.0})
        with lease.hold(tmp_path, beat_s=0.1, expiry_s=0.5) as new_lease:
            with make_trackers(config, tmp_path, check=new_lease.check_now) as new:
                new.start({}, {}, start_step=5, total_steps=9)
                new.log(6, {"loss": 0.9})
                new.log_summary({"status": "finished", "steps": 9})
            before = contents(tmp_path)
            with pytest.raises(RunInUseError if error is None else type(error)), old:
                old.log(6, {"loss": 0.95})
                if error is not None:
                    raise error
                old.log_summary({"status": "finished", "steps": 9})
            assert contents(tmp_path) == before
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.9]


def test_failing_storage_is_said_once_and_the_next_tracker_still_gets_its_metrics(caplog):
    notes: list[str] = []
    trackers = MultiTracker([Noting("a", notes, log=OSError(28, "No space left")), Noting("b", notes)])
    for step in range(3):
        trackers.log(step, {})
    assert notes.count("b.log") == 3
    assert caplog.text.count("training goes on") == 1
    trackers.close()
    assert "3 calls failed" in caplog.text


def test_a_mistake_in_a_tracker_is_not_taken_for_failing_storage(tmp_path, monkeypatch, caplog):
    """In one of the package it ends the run; in a user's it is logged with its traceback, and training goes on."""
    seen = []
    trackers = MultiTracker([Noting("a", [], log=TypeError("a bug")), Noting("b", seen)])
    trackers.log(0, {})
    trackers.log(1, {})
    (message,) = caplog.records
    assert "Noting: TypeError: a bug; training goes on" in message.getMessage() and message.exc_info
    assert len(seen) == 2
    monkeypatch.setattr(JsonlTracker, "log", lambda self, step, metrics: {}["a bug"])
    with pytest.raises(KeyError):
        MultiTracker([JsonlTracker(tmp_path)]).log(0, {})


def test_build_opens_nothing_before_start_and_leaves_out_what_is_off(tmp_path):
    make_trackers(TrackConfig(), tmp_path)
    assert not list(tmp_path.iterdir())
    with make_trackers(TrackConfig(tensorboard=False, console="off"), tmp_path) as trackers:
        trackers.start({}, {}, start_step=0, total_steps=2)
        trackers.log(0, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0


def test_due_names_each_nth_step_and_the_last():
    config = TrackConfig(log_every=10)
    assert [step for step in range(1, 26) if config.due(step, 25)] == [1, 10, 20, 25]


def test_a_config_that_never_logs_is_refused():
    problem(TrackConfig(log_every=0), "log_every=0")


def test_nothing_here_imports_jax():
    code = (
        "import sys; from jaxinfra.track import charts, console, terminal_plot, memory, report, tracker;"
        "sys.exit('jax' in sys.modules or 'tensorflow' in sys.modules)"
    )
    assert demo.start(code).returncode == 0


def test_rss_grows_with_memory_that_is_touched():
    code = (
        "from jaxinfra.track.memory import rss_bytes; before = rss_bytes();"
        "held = bytearray(b'x') * 50_000_000; print(rss_bytes() - before, len(held))"
    )
    grown = int(demo.start(code).stdout.split()[0])
    assert 45e6 < grown < 60e6
    assert rss_bytes() > 5e6
