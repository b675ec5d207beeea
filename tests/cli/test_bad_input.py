"""Wrong files, folders and words end with one line that says what to do, and change nothing that is there."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.cli.main import main
from jaxinfra.config import Loaded, record
from jaxinfra.errors import ConfigError
from jaxinfra.storage.lease import Owner, hold
from jaxinfra.track.jsonl import JsonlTracker
from jaxinfra.track.memory import available_bytes
from tests.refusals import mend, names, refused
from tests.tiny_run import STEPS, Ended, Tiny, contents, launch, summary


def test_missing_store_names_the_command_that_makes_it(tiny: Tiny, tmp_path: Path) -> None:
    store = f"data.store={tmp_path / 'elsewhere'}"
    line = refused(tiny.launch(store), store)
    command = line.partition("python -m launch ")[2].split()
    assert launch(*command).code == 0
    assert tiny.launch(store, "train.steps=1", "optim.schedule.warmup_steps=0").code == 0


def test_an_output_without_space_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("w") as full, redirect_stdout(full):
        code = main(["models", "llama"])
    refused(Ended(code=code, out="", err=capsys.readouterr().err), "No space left on device", code=82)


def test_a_bucket_without_credentials_is_answered_with_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    refused(launch("runs", "s3://bucket-of-nobody/runs"), "s3://bucket-of-nobody/runs set credentials", code=82)


def test_damaged_store(begun: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    """A file that is missing or cut short is named, before anything runs."""
    before = contents(begun.runs)
    for number, damage in enumerate((lambda path: path.unlink(), lambda path: os.truncate(path, 5))):
        store = tmp_path / f"store{number}"
        shutil.copytree(tiny_data / "store", store)
        largest = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        damage(largest)
        refused(begun.launch(f"data.store={store}"), str(largest), code=78)
    assert contents(begun.runs) == before


def test_credentials_in_the_words_of_a_command_are_not_repeated(tiny: Tiny) -> None:
    url = "s3://AKIA:sEcReT@bucket/runs/x"
    one, two = (
        tiny.edited(repr(str(tiny.loaded().data.store)), repr(store), name=name)
        for name, store in (("one.py", url), ("two.py", "s3://bucket/x?X-Amz-Signature=sEcReT"))
    )
    commands = {
        ("diff", str(one), str(two)): (0, "s3://***@bucket/runs/x s3://bucket/x?X-Amz-Signature=***"),
        (str(tiny.config), "--import", url): (81, "s3://***@bucket/runs/x"),
        (str(tiny.config), f"--name={url}"): (81, "name=s3://***@bucket/runs/x"),
        ("runs", url, "--debug"): (81, "s3://***@bucket/runs/x credentials"),
        ("sample", url, "hello"): (81, "s3://bucket/runs/x credentials"),
        ("runs", str(tiny.runs), "--all", url): (2, "s3://***@bucket/runs/x"),
    }
    for words, (code, named) in commands.items():
        done = launch(*words)
        assert done.code == code, done
        names(" ".join((done.out + done.err).split()), named)
        assert "sEcReT" not in done.out + done.err
    loaded = Loaded(run=tiny.loaded(), source="python", origins={})
    written = record(loaded, command=["launch", "diff", url], versions={}, git={}, devices=[])
    assert written["command"] == ["launch", "diff", "s3://***@bucket/runs/x"]


def test_wrong_config_file(tmp_path: Path) -> None:
    path = tmp_path / "wrong.py"
    for text, named in (("def config(:\n", f"{path}:1:"), ("def config():\n    return {}\n", f"{path}: dict")):
        path.write_text(text)
        refused(launch(str(path)), named)


def test_config_file_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    refused(launch(str(tmp_path / "tinny.py")), "/tinny.py", f"{tmp_path}/tiny.py?")
    refused(launch(str(tmp_path)), str(tmp_path), "directory")
    nameless = tiny.edited('        name="tiny",\n', "", name="nameless.py")
    refused(launch(str(nameless)), "/nameless.py: 'name'")


def test_run_record(begun: Tiny) -> None:
    """A broken record is never written over."""
    record = begun.directory() / "run.json"
    text = record.read_text()
    cases = {
        text[:200]: "/run.json: JSON",
        text.replace('"format": 1', '"format": 99'): "/run.json: format=99",
        "{}": "/run.json: format",
        text.replace('"peak_lr"', '"peak_r"'): "/run.json: optim.peak_r: .peak_lr?",
    }
    for broken, named in cases.items():
        record.write_text(broken)
        before = contents(begun.runs)
        for ended in (begun.launch(), launch(str(record))):
            refused(ended, named)
        assert contents(begun.runs) == before


def test_directory_of_another_config(begun: Tiny) -> None:
    edited = begun.edited("peak_lr=3e-3", "peak_lr=4e-3, clip_norm=2.0")
    before = contents(begun.runs)
    line = refused(begun.launch(config=edited), "/runs/tiny: optim.peak_lr 0.003 0.004")
    assert contents(begun.runs) == before
    assert mend(begun, [], line) == ["name=ANOTHER"]


def test_directory_of_other_data(begun: Tiny, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on with the version that it was begun on; where that is gone, it stays as it is."""
    text, store = tmp_path / "text", tmp_path / "store"
    shutil.copytree(tiny_data / "text", text)
    start = [f"data.store={store}", "name=mine"]
    prepare = ["data", "prepare", str(begun.recipe), f"source.root={text}", f"store={store}"]
    assert launch(*prepare).code == 0
    assert begun.launch(*start).code == 0
    (first,) = (path.name for path in store.iterdir() if path.is_dir())
    shutil.rmtree(begun.directory("mine") / "checkpoints" / "12")
    next(iter(sorted(text.iterdir()))).write_text("w1 w2 w3\n" * 100)
    assert launch(*prepare).code == 0
    (begun.directory("mine") / "run.json").unlink()  # the checkpoint knows it too
    assert begun.launch(*start).code == 0
    assert json.loads((begun.directory("mine") / "run.json").read_text())["data_versions"] == [first]
    assert f"{store}/{first}" in launch("data", "peek", str(begun.directory("mine") / "run.json"), "--rows", "0").out
    shutil.rmtree(begun.directory("mine") / "checkpoints" / "12")
    start.append("optim.peak_lr=0.002345")
    monkeypatch.setenv("MY_TOKEN", "0.002345")
    assert begun.launch(*start, "--accept-change").code == 0
    record = json.loads((begun.directory("mine") / "run.json").read_text())
    assert record["data_versions"] == [first]
    assert record["changes"] == [{"step": 10, "fields": {"optim.peak_lr": ["0.003", "$MY_TOKEN"]}}]
    shutil.rmtree(begun.directory("mine") / "checkpoints" / "12")
    shutil.rmtree(store)
    assert launch(*prepare).code == 0
    before = contents(begun.runs)
    refused(begun.launch(*start), f"data.version={first} {store}")
    second = next(path.name for path in store.iterdir() if path.is_dir())
    refused(begun.launch(*start, f"data.version={second}"), f"/mine: {first} {second} name=ANOTHER")
    refused(begun.launch(*start, "data.seq_len=16"), "/mine: data.seq_len")
    assert contents(begun.runs) == before
    shutil.rmtree(begun.directory("mine") / "checkpoints")
    assert begun.launch(*start, "data.seed=5").code == 0  # another run that takes the place of one with nothing saved
    assert json.loads((begun.directory("mine") / "run.json").read_text())["data_versions"] == [second]


def test_corpus(tiny: Tiny, tmp_path: Path) -> None:
    def prepare(*overrides: str) -> Ended:
        return launch("data", "prepare", str(tiny.recipe), f"store={tmp_path / 'new'}", *overrides)

    (tmp_path / "empty").mkdir()
    refused(prepare("work_dir="), "work_dir='' work_dir=none")
    refused(prepare("work_dir=s3://bucket/x"), "work_dir= work_dir=PATH")
    refused(prepare(f"source.root={tmp_path / 'empty'}"), f"pattern=*.txt: {tmp_path}/empty")
    for place in (tmp_path / "nowhere", tiny.config):
        refused(prepare(f"source.root={place}"), f"root={place}")
    for wrong, field in (
        ("validation.fraction=2", "validation.fraction=2.0"),
        ("tokenizer.vocab_size=100", "tokenizer.vocab_size=100"),
        ("--workers 0", "--workers"),
    ):
        refused(prepare(*wrong.split()), field, "use")
    refused(launch("data", "prepare", str(tiny.recipe), f"store={tmp_path}"), f"store={tmp_path}")
    assert not (tmp_path / "new").exists()


def test_what_is_no_recipe(tiny: Tiny, tmp_path: Path) -> None:
    part = tmp_path / "part.py"
    part.write_text("from jaxinfra.run import TrainConfig\n\n\ndef config():\n    return TrainConfig()\n")
    for words in ((tiny.config, "data.recipe=none"), (tiny.config, f"data.recipe={tiny.config}"), (part,)):
        refused(launch("data", "prepare", *map(str, words)), f"{words[0]}: recipe")


def test_a_batch_beyond_the_memory_of_the_host(tiny: Tiny) -> None:
    """It is refused before anything is allocated."""
    for samples in (2**40, int(available_bytes() / 128)):  # a sample has 32 tokens and as many targets, all of int32
        batch = samples // 8 * 8
        refused(tiny.launch(f"train.global_batch={batch}"), f"train.global_batch={batch}: GiB available use")
    assert not tiny.runs.exists()


def test_no_space(begun: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    before = contents(begun.runs)
    refused(begun.launch(), "/runs/tiny: kB checkpoint.keep_last", code=82)
    assert contents(begun.runs) == before


def test_unwritable_root(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    refused(tiny.launch(), "/runs/tiny: Permission denied", code=82)
    assert not tiny.runs.exists()


def test_sample(tiny: Tiny, begun: Tiny, tmp_path: Path) -> None:
    refused(launch("sample", str(tmp_path), "w1"), str(tmp_path), "run.json")
    run_dir, checkpoints = str(begun.directory()), begun.directory() / "checkpoints"
    shutil.rmtree(checkpoints)
    refused(launch("sample", run_dir, "w1"), f"{checkpoints}:", code=79)
    checkpoints.mkdir()
    refused(launch("sample", run_dir, "w1"), f"{checkpoints}:", code=79)
    for option, text in (("--temperature", "-1"), ("--top-k", "-1"), ("--top-p", "0"), ("--max-tokens", "0")):
        refused(launch("sample", run_dir, "w1", f"{option}={text}"), f"{option} {text} use")


@pytest.mark.parametrize("devices", ["nonsense", "cpu:0", "cpu:x", "gpu:2", ""])
def test_devices(tiny: Tiny, devices: str) -> None:
    refused(tiny.launch("--devices", devices), f"--devices {devices}: cpu:N, gpu tpu; use cpu:8")


def test_command_word() -> None:
    for words in (["shwo"], ["shwo", "config.py"]):
        refused(launch(*words), "shwo: show? prepare, sample,")
    refused(launch("xyzzy"), "xyzzy: train, configs/quickstart.py")
    assert launch("show").code == 2
    assert launch().code == 2


@pytest.mark.parametrize("command", ["bench", "faults"])
def test_a_command_of_the_clone_alone(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed wheel does not have it, and says how to get it."""
    monkeypatch.delitem(COMMANDS, command)
    refused(launch(command, "step"), f"{command}: python -m launch")


def test_debug_shows_the_traceback(tiny: Tiny) -> None:
    for words in (["--debug", "train.stepz=1"], ["train.stepz=1", "--debug"]):
        ended = tiny.launch(*words)
        assert ended.code == ConfigError.exit_code
        assert ended.err.startswith("Traceback (most recent call last):\n")
        assert "error: train.stepz" in ended.err.splitlines()[-1]


def test_lost_record(begun: Tiny) -> None:
    """Without run.json a checkpoint still tells what config it is of."""
    (begun.directory() / "run.json").unlink()
    edited = begun.edited("peak_lr=3e-3", "peak_lr=4e-3")
    refused(begun.launch(config=edited), "/runs/tiny: optim.peak_lr")


def test_two_starts_of_one_run(begun: Tiny) -> None:
    """The second is refused while the first goes on, and touches nothing."""
    with hold(begun.directory()):
        before = contents(begun.runs)
        refused(begun.launch(), f"/runs/tiny: process {os.getpid()} name=ANOTHER", code=84)
        assert contents(begun.runs) == before


@pytest.mark.parametrize("at", [7, STEPS])
def test_a_start_that_loses_its_run_leaves_it_to_the_other(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Another host has taken over the run while this one was stopped, and has trained it to its end."""
    directory, log = tiny.directory(), JsonlTracker.log
    other = asdict(replace(Owner.this_process(), host="other", id="other"))

    def log_late(self: JsonlTracker, step: int, metrics: Mapping[str, float]) -> None:
        if step == at and "loss" in metrics:
            (directory / "lease/00000002.json").write_text(json.dumps(other))
            for name in ("run.json", "summary.json", "report.html"):
                (directory / name).write_text("of the other")
        log(self, step, metrics)

    monkeypatch.setattr(JsonlTracker, "log", log_late)
    refused(tiny.launch("track.console=off"), f"{directory} other taken over", code=84)
    for name in ("run.json", "summary.json", "report.html"):
        assert (directory / name).read_text() == "of the other"
    steps = [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(steps, default=0) < at


def test_diverged_run_keeps_its_last_good_checkpoint(tiny: Tiny) -> None:
    """A run that is no longer numbers ends with its own code and saves nothing of it; its report says why."""
    overrides = ("optim.peak_lr=1e30", "checkpoint.save_every=1", "name=diverged")
    error = refused(tiny.launch(*overrides), "step is name=ANOTHER", code=80)
    assert summary(tiny.directory("diverged")) == {"status": "failed", "error": error}
    assert ">failed<" in (tiny.directory("diverged") / "report.html").read_text()
    kept = sorted(int(p.name) for p in (tiny.directory("diverged") / "checkpoints").iterdir() if p.name.isdecimal())
    with CheckpointManager(tiny.directory("diverged") / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.all_steps() == kept and kept and max(kept) < 12


def test_run_that_never_made_a_step_blocks_nothing(tiny: Tiny) -> None:
    """A config that was refused while it was compiled can be mended under the same name."""
    refused(tiny.launch("model.attention_kernel=cudnn"), "model.attention_kernel=cudnn: cpu")
    assert tiny.launch("optim.clip_norm=2.0", "name=tiny").code == 0
