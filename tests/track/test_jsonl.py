import json
import math

import pytest

from jaxinfra.errors import StorageError
from jaxinfra.track.jsonl import JsonlTracker, read_metrics, read_samples
from jaxinfra.track.tracker import MultiTracker
from tests.refusals import names, raises
from tests.track import demo
from tests.track.test_tensorboard import events


def start(run_dir, start_step=0):
    tracker = JsonlTracker(run_dir)
    tracker.start({}, {}, start_step=start_step, total_steps=100)
    return tracker


def test_values_come_back_exactly_and_each_line_is_valid_json(tmp_path):
    metrics = {"loss": 0.1 + 0.2, "bad": math.nan, "up": math.inf, "down": -math.inf, "tokens": 2**53}
    tracker = start(tmp_path)
    tracker.log(0, metrics)
    line = (tmp_path / "metrics.jsonl").read_text()  # before close: a killed run has lost nothing

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(line, parse_constant=refuse)["bad"] == "nan"
    tracker.close()
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row.pop("step") == 0 and row.pop("time_s") >= 0
    assert math.isnan(row.pop("bad")) and math.isnan(metrics.pop("bad"))
    assert row == metrics


def test_resume_drops_what_will_be_run_again(tmp_path):
    tracker = start(tmp_path)
    for step in range(1, 16):
        tracker.log(step, {"loss": float(step)})
    tracker.log(10, {"eval/loss": 1.0})
    tracker.close()
    before_s = read_metrics(tmp_path / "metrics.jsonl")[9]["time_s"]
    tracker = start(tmp_path, 10)
    for step in range(11, 21):
        tracker.log(step, {"loss": -float(step)})
    tracker.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21)) == list(losses)
    assert losses[10] == 10 and losses[11] == -11
    assert any("eval/loss" in row for row in rows)
    assert rows[-1]["time_s"] >= rows[11]["time_s"] >= before_s
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b'{"step": 3, "loss": 2.5}', b"\x00\x00\x00", b'"x"'])
def test_a_torn_last_line_is_left_out_and_mended(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 2.0}\n' + torn)
    whole = 1 + torn.endswith(b"}")
    assert len(read_metrics(path)) == whole
    tracker = start(tmp_path, 4)
    tracker.log(4, {"loss": 1.0})
    tracker.close()
    assert [row["step"] for row in read_metrics(path)] == [2, 3, 4][:whole] + [4]


DAMAGED = (
    b'{"step": 1, "\\ud800": 1.0}',
    *(b'{"st', b"\xff\x00", b"[1]", b'"x"', b"7", b"null", b"[" * 100_000, b'{"step": ' + b"9" * 5000 + b"}"),
    *(b'{"step": true}', b'{"step": "1"}', b'{"step": 1.0}', b'{"loss": 1.0}', b'{"step": 1, "loss": [2.0]}'),
    *(b'{"step": 1, "loss": null}', b'{"step": 1, "loss": "low"}', b'{"step": 1, "time_s": NaN}'),
    *(
        b'{"step": 1, "loss": ' + b"9" * 400 + b"}",
        b'{"step": 1, "loss": ' + b'{"a":' * 3000 + b"1" + b"}" * 3000 + b"}",
    ),
)
"""Lines that are no rows of metrics."""


def test_damaged_lines_are_left_out_in_one_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([b'{"step": 1}', *DAMAGED, b'{"step": 2, "loss": "nan"}', b'{"st']))
    for _ in range(2):  # once in a process: the report is written again and again
        assert [row["step"] for row in read_metrics(path)] == [1, 2]
    (message,) = caplog.messages
    names(message, f"{path}:2: {len(DAMAGED)} of {len(DAMAGED) + 2} lines")
    tracker = start(tmp_path, 2)
    tracker.log(3, {"loss": 1.0})
    tracker.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_missing_file_is_named(tmp_path):
    with raises(StorageError, str(tmp_path / "metrics.jsonl")):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_unwritable_run_directory_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("")
    with raises(StorageError, str(tmp_path / "file")):
        start(tmp_path / "file")


FULL_DISK = """
import resource, sys
from pathlib import Path
from jaxinfra.track.config import TrackConfig
from jaxinfra.track.tracker import make_trackers

run_dir = Path(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with make_trackers(TrackConfig(console="off"), run_dir) as trackers:
    trackers.start({}, {}, start_step=0, total_steps=400)
    for step in range(400):
        if step == 20:  # from here no file may grow, in the middle of a line
            limit = (run_dir / "metrics.jsonl").stat().st_size + 50
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        if step == int(sys.argv[2]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        trackers.log(step, {"loss": 1.0 / (step + 1), "lr": 1e-3})
"""


def test_a_full_disk_delays_lines_and_loses_none(tmp_path):
    result = demo.start(FULL_DISK, tmp_path, 300)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("JsonlTracker: [Errno 27] File too large; training goes on") == 1, result.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(400))
    (path,) = (tmp_path / "tensorboard").iterdir()
    logged = [event.step for event in events(path) if event.summary.value[:1] and event.summary.value[0].simple_value]
    assert logged == list(range(400))


def test_a_disk_full_to_the_end_is_an_error_that_counts_the_lost_lines(tmp_path):
    result = demo.start(FULL_DISK, tmp_path, 1000)
    assert (
        "StorageError" in result.stderr
        and "metrics.jsonl: " in result.stderr
        and "records lost because the disk is full" in result.stderr
    )
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(len(rows))) and len(rows) >= 20


def test_summary_replaces_the_file(tmp_path):
    tracker = start(tmp_path)
    tracker.log_summary({"steps": 1})
    tracker.log_summary({"steps": 2, "final_loss": math.nan, "baselines": {"unigram": 4.5}})
    tracker.close()
    tracker.close()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found == {"steps": 2, "final_loss": "nan", "baselines": {"unigram": 4.5}}


def test_samples_after_the_step_of_a_resume_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    tracker = start(tmp_path)
    for step in (4, 9):
        tracker.log_sample(step, f"after {step}\nsecond line")
    tracker.close()
    with path.open("a") as file:
        file.write('{"step": 12, "te')
    assert read_samples(path) == [(4, "after 4\nsecond line"), (9, "after 9\nsecond line")]
    tracker = start(tmp_path, 8)
    tracker.log_sample(9, "again")
    tracker.close()
    assert read_samples(path) == [(4, "after 4\nsecond line"), (9, "again")]
    path.write_text('{}\n{"step": 4, "text": 5}\n{"step": "4", "text": "x"}\n' + path.read_text())
    assert read_samples(path) == [(4, "after 4\nsecond line"), (9, "again")]


def test_samples_show_no_credentials(tmp_path):
    with MultiTracker([JsonlTracker(tmp_path)]) as trackers:
        trackers.log_sample(1, "see https://sEcReT@host/x")
    assert read_samples(tmp_path / "samples.jsonl") == [(1, "see https://***@host/x")]
