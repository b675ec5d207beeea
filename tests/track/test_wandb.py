"""W&B without a network: the files that `wandb sync` would send are read back."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.track import demo

pytest.importorskip("wandb", reason="pip install wandb")

RUN = """
import sys
from pathlib import Path
from jaxinfra.track.config import TrackConfig, Wandb
from jaxinfra.track.tracker import make_trackers

run_dir, start_step, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
wandb = Wandb(project="p", entity="e", group="g", tags=("a", "b"), mode=mode)
with make_trackers(TrackConfig(wandb=wandb, tensorboard=False, console="plain"), run_dir) as trackers:
    trackers.start({"config": {"optim": {"peak_lr": 0.1}}}, {"parameters": (7, "count")},
                   start_step=start_step, total_steps=9)
    for step in range(start_step + 1, start_step + 4):
        trackers.log(step, {"loss": step / 4, "mfu": 0.5})
    trackers.log(step, {"eval/loss": 3.0})
    trackers.log_sample(step, "Once <upon>")
    trackers.log_summary({"status": "finished"})
"""


def blocks(path: Path) -> Iterator[bytes]:
    """Reads a .wandb file: records in LevelDB's log format, after a header of seven bytes."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # too little for a header: the rest of a block of 32 KiB is filled with zeros
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def contents(folder: Path) -> tuple:
    """Returns the run, its logged rows, and its exit code."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    records = [Record.FromString(block) for block in blocks(path)]
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    (end,) = (record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit")
    return run, rows, end


@pytest.mark.slow(15)
def test_a_run_and_its_resume_are_one_run_of_wandb(tmp_path: Path) -> None:
    run_dir = tmp_path / "story"
    for start_step in (0, 2):
        ended = demo.start(RUN, run_dir, start_step, "offline")
        assert ended.returncode == 0, ended.stderr
        assert "track.wandb: wandb sync " in ended.stderr
    first, second = sorted((run_dir / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    run, rows, end = contents(first)
    assert (run.project, run.entity, run.run_group, [*run.tags]) == ("p", "e", "g", ["a", "b"])
    assert run.display_name == "story" and end == 0
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["optim"] == {"peak_lr": 0.1} and config["derived"] == {"parameters": 7}
    assert [row["train/loss"] for row in rows[:3]] == [0.25, 0.5, 0.75]
    assert (rows[3]["eval/loss"], rows[3]["step"], rows[2]["perf/mfu"]) == (3.0, 3, 0.5)
    resumed, rows, _ = contents(second)
    assert resumed.run_id == run.run_id and [row["step"] for row in rows] == [3, 4, 5, 5, 5]
    assert "<pre>Once &lt;upon&gt;</pre>" in (second / "files" / rows[4]["sample/path"]).read_text()


def test_a_missing_or_wrong_key_is_named_and_training_goes_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a-wrong-key")
    ended = demo.start(RUN, tmp_path, 0, "online")
    assert ended.returncode == 0
    assert "track.wandb.project=p: WANDB_API_KEY invalid" in ended.stderr
    assert "a-wrong-key" not in ended.stderr + ended.stdout
    assert "5 of 5 logged rows were not sent" in ended.stderr
