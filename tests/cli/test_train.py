"""A run from its config to its report, in this process, on eight emulated devices."""

import json
import re
import shutil
from pathlib import Path

import pytest

from jaxinfra.track.formatting import format_metric
from jaxinfra.track.jsonl import read_metrics
from tests.refusals import refused
from tests.tiny_run import STEPS, Tiny, contents, launch, summary
from tests.track.test_tensorboard import events


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


def test_the_loss_of_a_step_is_one_number_everywhere(tiny: Tiny) -> None:
    """People see the mean since the last logged step, rounded once; files also have the loss of the step itself."""
    short = ("track.log_every=4", "track.tensorboard=true", "train.steps=6", "train.eval_every=none", "name=short")
    ended, directory = tiny.launch(*short), tiny.directory("short")
    assert ended.code == 0, ended
    *trained, last = read_metrics(directory / "metrics.jsonl")
    assert [(row["step"], "tokens_per_s" in row) for row in trained] == [(1, False), (4, True), (6, True)]
    losses = [format_metric(row["loss_mean"]) for row in trained]
    assert losses[-1] != format_metric(trained[-1]["loss"])
    assert re.findall(r"^step \d/6  loss +(\S+)  lr", ended.out, re.MULTILINE) == losses
    assert re.search(rf"Final training loss +{losses[-1]} *\n", ended.out)
    assert f" {losses[-1]} " in launch("runs", str(tiny.runs)).out
    page = (directory / "report.html").read_text()
    assert f"<dt>Final training loss</dt><dd>{losses[-1]}</dd>" in page
    assert f'"steps":[1,4,6],"values":[{",".join(str(float(loss)) for loss in losses)}]' in page
    (file,) = (directory / "tensorboard").iterdir()
    scalars = [value for event in events(file) for value in event.summary.value if value.tag.startswith("train/loss")]
    assert [(value.tag, format_metric(value.simple_value)) for value in scalars] == [
        ("train/loss", loss) for loss in losses
    ]
    bits = format_metric(last["eval/bits_per_byte"])
    assert f"bits per byte {bits}\n" in ended.out and f"<dt>Validation bits per byte</dt><dd>{bits}</dd>" in page
    assert re.search(rf"bits_per_byte\s+{bits}", launch("checkpoints", str(directory)).out)


def test_a_stop_between_two_logged_steps_has_one_loss(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the mean of the steps since the last logged one, in the summary, the page and the table."""
    monkeypatch.setenv("JAXINFRA_FAIL", "step:0:6:term")
    stopped, directory = (
        tiny.launch("track.log_every=4", "train.eval_every=none", "name=stopped"),
        tiny.directory("stopped"),
    )
    assert stopped.code == 75, stopped
    found = json.loads((directory / "summary.json").read_text())["final_loss"]
    assert found != read_metrics(directory / "metrics.jsonl")[-1]["loss_mean"]
    assert f" {format_metric(found)} " in launch("runs", str(tiny.runs)).out
    assert f"<dt>Final training loss</dt><dd>{format_metric(found)}</dd>" in (directory / "report.html").read_text()


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
