"""Damaged files of a run, at random: commands that read them, and the next start, say so in a line at most.

`python -m tests.track.test_damaged_files NUMBER` tries more of them.
"""

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from jaxinfra.processes.peers import Peers
from jaxinfra.run_dir import RunDirectory
from jaxinfra.track.attempts import AttemptLog
from jaxinfra.track.goodput import GOODPUT_FILE
from jaxinfra.track.jsonl import JsonlTracker
from jaxinfra.train.ledger import Ledger
from jaxinfra.train.phases import Phases
from jaxinfra.train.skipped import SkippedSamples
from tests.tiny_run import launch
from tests.track.test_report import record

FILES = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl", "goodput.jsonl", "summary.json", "attempts.jsonl")
ODD: tuple[Any, ...] = (None, True, -1, 10**30, 1e308, "", "nan", "x", [], [1], {}, {"a": {"b": 1}}, 10**400, "\ud800")
"""Values of other types, or out of range."""

NO_BATCHES: Any = None  # of which nothing was left out yet


def write_run(folder: Path) -> None:
    """Writes the files of a run of 12 steps that was started twice."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record(root="Run")))
    for start in (0, 6):
        phases = Phases()
        ledger = Ledger(phases)
        ledger.open(folder / GOODPUT_FILE, 1)
        tracker = JsonlTracker(folder)
        tracker.start({}, {}, start_step=start, total_steps=12)
        phases.resume(start)
        for step in range(start + 1, start + 7):
            phases.finish_step(step)
            tracker.log(
                step, {"loss": 1 / step, "lr": 1e-3, "tokens_per_s": 1e5, "step_time_s": 0.1, "rss_bytes": 2**30}
            )
            ledger.write()
        tracker.log(start + 6, {"eval/loss": 0.5 / step, "eval/bits_per_byte": 0.4 / step})
        tracker.log_sample(step, f"after {step}")
        AttemptLog(str(folder)).append({"attempt": 1, "exit_code": 0})
        if start:
            tracker.log_summary(SUMMARY)
            ledger.write(stopped="SIGTERM")
        tracker.close()
        ledger.close()
    skipped = [{"step": step, "split": "train", "samples": [step, 9]} for step in (3, 9)]
    (folder / "skipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in skipped))


SUMMARY = {
    "status": "finished",
    "steps": 12,
    "modality": "token",
    "wall_s": 3.0,
    "final_loss": 0.1,
    "tokens_per_s_median": 1e5,
    "mfu_median": 0.4,
    "peak_rss_bytes": 2**30,
    "tokens": 4096,
    "validation": {"loss": 0.1, "bits_per_byte": 0.2},
    "baselines": {"bits_per_byte": {"unigram": 4.5}},
    "peak_flops_per_device": 1e12,
    "peak_source": "measured",
    "checkpoint": "c",
    "report": "r",
}


def damage(content: bytes, draw: random.Random) -> bytes:
    """Flips bits, cuts, zeroes or repeats a part, or puts another value in the place of one."""
    at = draw.randrange(len(content))
    other = draw.choice(
        (_with_another_value, _with_another_value, _with_another_value, _flip, _flip)
        + (lambda c, d: c[:at], lambda c, d: c[:at] + bytes(64) + c[at + 64 :], lambda c, d: c[:at] + c[at // 2 :])
        + (lambda c, d: d.randbytes(100), lambda c, d: b"", lambda c, d: c + b"[" * 100_000 + b"\n" + c)
    )
    return other(content, draw)


def _flip(content: bytes, draw: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(draw.choice((1, 1, 8))):
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(flipped)


def _with_another_value(content: bytes, draw: random.Random) -> bytes:
    """Replaces a value, at any depth, or removes it; summary.json is one line here."""
    lines = content.splitlines() if content.startswith(b'{"') else [content]
    number = draw.randrange(len(lines))
    tree = parent = json.loads(lines[number])
    while True:
        key = draw.choice([*parent])
        if not isinstance(parent[key], dict) or not parent[key] or draw.random() < 0.3:
            break
        parent = parent[key]
    if draw.random() < 0.2:
        del parent[key]
    else:
        parent[key] = draw.choice(ODD)
    lines[number] = json.dumps(draw.choice((tree, tree, tree, [tree], key))).encode()
    return b"\n".join(lines) + b"\n"


def resume(folder: Path) -> None:
    """Opens the files as the next start of the run does."""
    RunDirectory(folder).summary()
    SkippedSamples(folder, Peers(), NO_BATCHES, start_step=6, is_on=True)
    ledger = Ledger(Phases())
    ledger.open(folder / GOODPUT_FILE, 1)
    tracker = JsonlTracker(folder)
    tracker.start({}, {}, start_step=6, total_steps=12)
    tracker.log(7, {"loss": 1.0})
    tracker.close()
    ledger.close()
    AttemptLog(str(folder)).append({"attempt": 1, "exit_code": 0})
    last = json.loads((folder / "attempts.jsonl").read_bytes().splitlines()[-1])
    assert last["exit_code"] == 0 and b'{"step": 7' in (folder / "metrics.jsonl").read_bytes()


def try_damage(whole: Path, folder: Path, draw: random.Random) -> tuple[str, int]:
    """Damages one file; returns its name and how many commands refused it."""
    name, refusals = draw.choice(FILES), 0
    shutil.copytree(whole, folder)
    content = damage((folder / name).read_bytes(), draw)
    (folder / name).write_bytes(content)
    for command in ("runs", "goodput", "report"):
        ended = launch(command, str(folder))
        assert ended.code in (0, 81, 82) and "Traceback" not in ended.err, (name, command, content, ended)
        assert len(ended.err.splitlines()) <= 1 and (ended.code == 0 or ended.err.startswith("error: ")), ended
        refusals += ended.code != 0
    try:
        resume(folder)
    except Exception as error:
        raise AssertionError((name, content)) from error
    return name, refusals


def test_damage_is_never_a_traceback(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    draw = random.Random(0)
    for number in range(20):
        try_damage(tmp_path / "whole", tmp_path / str(number), draw)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_run(Path(name, "whole"))
        tried, refused = Counter[str](), Counter[str]()
        for seed in range(int(sys.argv[1])):
            file, refusals = try_damage(Path(name, "whole"), Path(name, str(seed)), random.Random(seed))
            tried[file] += 1
            refused[file] += refusals
            shutil.rmtree(Path(name, str(seed)))
        print(f"tried {dict(tried)}, refused in one line by one of three commands: {dict(refused)}")
