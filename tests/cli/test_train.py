"""A run from its config to its report, in this process, on eight emulated devices."""

import json
import shutil
from pathlib import Path

import pytest

from jaxinfra.track.jsonl import read_metrics
from tests.refusals import refused
from tests.tiny_run import STEPS, Tiny, contents, launch, summary


@pytest.mark.jax_range
def test_whole_run(tiny: Tiny) -> None:
    """It writes all that it promises; a second start says so and changes nothing."""
    ended = tiny.launch("track.tensorboard=true")
    assert (ended.code, ended.err) == (0, "")
    assert "new run " in ended.out and "step 12/12" in ended.out and "Training loss" in ended.out
    directory = tiny.directory()
    assert {path.name for path in directory.iterdir()} == {
        "lease",
        "run.json",
        "metrics.jsonl",
        "goodput.jsonl",
        "summary.json",
        "report.html",
        "tensorboard",
        "checkpoints",
    }
    rows = read_metrics(directory / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "eval/loss" in row] == [5, 10, STEPS]
    assert trained[-1]["loss"] < 0.7 * trained[0]["loss"]
    names = {"loss", "z_loss", "weight", "grad_norm", "lr", "step_time_s", "tokens_per_s", "mfu", "data_wait_s"}
    assert names <= trained[-1].keys()
    assert trained[-1]["tokens_per_s"] * trained[-1]["step_time_s"] == pytest.approx(8 * 32)

    found = summary(directory)
    assert (found["status"], found["steps"], found["tokens"]) == ("finished", STEPS, STEPS * 8 * 32)
    assert found["final_loss"] == trained[-1]["loss"]
    assert found["validation"]["loss"] == rows[-1]["eval/loss"]
    assert found["validation"]["bits_per_byte"] == rows[-1]["eval/bits_per_byte"]
    assert found["checkpoint"] == str(directory / "checkpoints" / str(STEPS))
    assert sorted(path.name for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()) == ["10", "12"]
    assert "tiny" in (directory / "report.html").read_text()

    record = json.loads((directory / "run.json").read_text())
    assert record["command"] == ["python", "-m", "launch", str(tiny.config), "track.tensorboard=true"]
    assert record["devices"]["count"] == 8 and record["devices"]["mesh"]["fsdp"] == 8
    assert record["versions"]["jax"] and record["derived"]["steps"][0] == STEPS

    before = contents(tiny.runs)
    again = tiny.launch()
    assert again.code == 0 and contents(tiny.runs) == before
    assert again.out.startswith(f"nothing to do: all {STEPS} steps of {directory} are done; to train on")


def test_replay_reads_the_versions_of_the_record(tiny: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    """`run.json` alone repeats a run, bit for bit, whatever was prepared since; where data is gone, it says so."""
    text, store = shutil.copytree(tiny_data / "text", tmp_path / "text"), tmp_path / "store"
    prepare = ["data", "prepare", str(tiny.recipe), f"source.root={text}", f"store={store}"]
    assert launch(*prepare).code == 0
    assert tiny.launch(f"data.store={store}", "name=first").code == 0
    (text / "0.txt").write_text("w1 w2 w3\n" * 100)
    assert launch(*prepare).code == 0
    record = tiny.directory("first") / "run.json"
    assert launch(str(record)).out.startswith("nothing to do")
    tiny.config.unlink()
    assert launch(str(record), "name=second").code == 0
    assert tiny.losses("second") == tiny.losses("first")
    first, second = (json.loads((tiny.directory(name) / "run.json").read_text()) for name in ("first", "second"))
    assert second["data_versions"] == first["data_versions"] == [first["config"]["data"]["version"]]
    (version,) = first["data_versions"]
    assert first["origins"]["data.version"] == "newest at the start"
    assert f"{store}/{version}: " in launch("data", "peek", str(record), "data.threads=2", "--rows", "0").out
    assert launch("sample", str(record.parent), "w1", "--max-tokens", "3").code == 0
    shutil.rmtree(store)
    assert launch(*prepare).code == 0
    refused(launch(str(record), "name=third"), f"data.version={version} {store}")


def test_quiet_run(tiny: Tiny) -> None:
    """Without any tracker there is still a run, a record and a report."""
    quiet = ("track.jsonl=false", "track.tensorboard=false", "track.console=off", "train.steps=3", "name=quiet")
    ended = tiny.launch(*quiet)
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert {path.name for path in tiny.directory("quiet").iterdir()} == {
        "run.json",
        "goodput.jsonl",
        "report.html",
        "checkpoints",
        "lease",
    }
    assert tiny.launch(*quiet).out.startswith("nothing to do: all 3 steps of ")


@pytest.mark.slow
def test_names(tiny: Tiny) -> None:
    """What changes the numbers of the file gets a directory of its own; what does not goes on in the same one."""

    def directories(*overrides: str) -> set[str]:
        before = {path.name for path in tiny.runs.iterdir()} if tiny.runs.exists() else set()
        ended = tiny.launch("track.console=off", *overrides)
        assert ended.code == 0, ended
        return {path.name for path in tiny.runs.iterdir()} - before

    assert directories() == {"tiny"}
    for same in (
        "mesh.fsdp=4 mesh.tensor=2",
        "train.accumulate=1",
        "checkpoint.save_every=3",
        "optim.peak_lr=3e-3",
        "seed=0",
    ):
        assert directories(*same.split()) == set(), same
    (named,) = directories("optim.peak_lr=1e-3", "train.steps=3")
    assert named.startswith("tiny-") and len(named) == len("tiny-123456")
    assert directories("train.steps=3", "optim.peak_lr=1e-3", "track.log_every=2") == set()
    assert directories("seed=1", "train.steps=3", "name=mine") == {"mine"}
    # A value that the class has by default is a change too where the file says otherwise.
    (other,) = directories("model.layers.mixer.num_heads=8", "optim.schedule.warmup_steps=0", "train.steps=3")
    assert other not in ("tiny", named)
