"""Wrong files, folders and words end with one line that says what to do, and change nothing that is there."""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from jaxinfra.checkpoint.checkpoints import Checkpoints
from jaxinfra.config import validate
from jaxinfra.errors import ConfigError
from jaxinfra.run import resolved
from tests.tiny_run import Ended, Tiny, contents, launch, refused


def test_missing_store_names_the_command_that_makes_it(tiny: Tiny, tmp_path: Path) -> None:
    store = f"data.store={tmp_path / 'elsewhere'}"
    line = refused(tiny.launch(store), r"data\.store=\S+: no store there; make it with: python -m launch .*")
    command = line.partition("python -m launch ")[2].split()
    assert launch(*command).code == 0
    assert tiny.launch(store, "train.steps=1", "optim.schedule.warmup_steps=0").code == 0


def test_damaged_store(begun: Tiny, tiny_data: Path, tmp_path: Path) -> None:
    """A file that is missing or cut short is named, before anything runs."""
    before = contents(begun.runs)
    for number, damage in enumerate((lambda path: path.unlink(), lambda path: os.truncate(path, 5))):
        store = tmp_path / f"store{number}"
        shutil.copytree(tiny_data / "store", store)
        largest = max((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        damage(largest)
        refused(begun.launch(f"data.store={store}"), rf"{re.escape(str(largest))}: .*; .*", 78)
    assert contents(begun.runs) == before


def test_config_file(tiny: Tiny, tmp_path: Path) -> None:
    def of(text: str) -> Ended:
        path = tmp_path / "wrong.py"
        path.write_text(text)
        return launch(str(path))

    refused(launch(str(tmp_path / "tinny.py")), r"\S+/tinny\.py: no such config file; did you mean \S+/tiny\.py\?")
    refused(launch(str(tmp_path)), r"\S+: is a directory; name a config file in it")
    refused(of("def config(:\n"), r"\S+/wrong\.py:1: SyntaxError: .*; mend the file")
    refused(of("def config():\n    return 1 / 0\n"), r"\S+/wrong\.py:2: ZeroDivisionError: division by zero")
    refused(of("import no_such_module\n"), r"\S+/wrong\.py:1: ModuleNotFoundError: No module named 'no_such_module'")
    refused(of("run = 1\n"), r"\S+/wrong\.py: no function config; define def config\(\) that returns the config")
    refused(of("def config():\n    return {}\n"), r"\S+: config\(\) must return a config dataclass, found dict")
    part = "from jaxinfra.train.loop import TrainConfig\n\n\ndef config():\n    return TrainConfig()\n"
    refused(of(part), r"\S+: expected a config of class Run, found TrainConfig")
    missing = tiny.edited('        name="tiny",\n', "", name="nameless.py")
    refused(launch(str(missing)), r"\S+/nameless\.py:\d+: TypeError: .*missing 1 required .* argument: 'name'")


def test_run_record(begun: Tiny, tmp_path: Path) -> None:
    """A broken record is never written over."""
    record = begun.directory() / "run.json"
    text = record.read_text()
    newer = text.replace('"format": 1', '"format": 99')
    cases = {
        text[:200]: r"\S+/run\.json:\d+: broken JSON, .*; restore the file",
        newer: r"\S+/run\.json: format=99 is newer than the 1 that this version reads; upgrade jaxinfra",
        "{}": r"\S+/run\.json: not a run record, it has no format; .*",
        text.replace(
            '"peak_lr"', '"peak_r"'
        ): r"\S+/run\.json: optim\.peak_r: no such field; did you mean .*\.peak_lr\?",
    }
    for broken, pattern in cases.items():
        record.write_text(broken)
        before = contents(begun.runs)
        refused(begun.launch(), pattern)
        refused(launch(str(record)), pattern)
        assert contents(begun.runs) == before


def test_directory_of_another_config(begun: Tiny) -> None:
    edited = begun.edited("peak_lr=3e-3", "peak_lr=4e-3, clip_norm=2.0")
    before = contents(begun.runs)
    line = refused(
        begun.launch(config=edited),
        r"\S+/runs/tiny: holds a run of another config: optim\.peak_lr is 0\.003 there and 0\.004 here and 1 more; "
        r"use name=ANOTHER, or change it back",
    )
    assert "name=ANOTHER" in line
    assert contents(begun.runs) == before
    validate(resolved(begun.loaded("name=ANOTHER"), 8))


def test_directory_of_other_data(begun: Tiny, tiny_data: Path, tmp_path: Path) -> None:
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
    shutil.rmtree(store)
    assert launch(*prepare).code == 0
    before = contents(begun.runs)
    refused(begun.launch(*start), rf"data\.version={first}: is not among the 1 versions of {store}; use .*")
    second = next(path.name for path in store.iterdir() if path.is_dir())
    refused(
        begun.launch(*start, f"data.version={second}"),
        rf"\S+/mine: was begun on data with fingerprint {first}, \S+ has {second}; use name=ANOTHER, or .*",
    )
    refused(begun.launch(*start, "data.seq_len=16"), r"\S+/mine: holds a run of another config: data\.seq_len is .*")
    assert contents(begun.runs) == before
    shutil.rmtree(begun.directory("mine") / "checkpoints")
    assert begun.launch(*start, "data.seed=5").code == 0  # another run that takes the place of one with nothing saved
    assert json.loads((begun.directory("mine") / "run.json").read_text())["data_versions"] == [second]


def test_corpus(tiny: Tiny, tmp_path: Path) -> None:
    def prepare(*overrides: str) -> Ended:
        return launch("data", "prepare", str(tiny.recipe), f"store={tmp_path / 'new'}", *overrides)

    refused(prepare("work="), r"work='': names no folder of this machine; use work=PATH")
    refused(prepare("work=s3://bucket/x"), r"work=\S+: names no folder of this machine; use work=PATH")
    (tmp_path / "empty").mkdir()
    refused(prepare(f"source.root={tmp_path / 'empty'}"), r"pattern=\*\.txt: matches no file in \S+/empty; mend the .*")
    refused(prepare(f"source.root={tmp_path / 'nowhere'}"), r"root=\S+: no such folder; give the folder that holds .*")
    refused(prepare(f"source.root={tiny.config}"), r"root=\S+: is a file; give its folder, .*")
    refused(
        prepare("heldout_fraction=2"),
        r"heldout_fraction=2\.0: .*; use heldout_fraction=0\.05",
    )
    refused(
        prepare("tokenizer.vocab_size=100"), r"tokenizer\.vocab_size=100: .*; use tokenizer\.vocab_size=257 or more"
    )
    refused(prepare("--workers", "0"), r"--workers 0: must be above 0; use --workers 2")
    refused(
        launch("data", "prepare", str(tiny.recipe), f"store={tmp_path}"),
        r"store=\S+: holds something that is no store \(\S+\); choose an empty place",
    )
    assert not (tmp_path / "new").exists()


def test_what_is_no_recipe(tiny: Tiny, tmp_path: Path) -> None:
    prepare = ("data", "prepare")
    refused(launch(*prepare, str(tiny.config), "data.recipe=none"), r"\S+/tiny\.py: its data names no recipe; name .*")
    refused(launch(*prepare, str(tiny.config), f"data.recipe={tiny.config}"), r"\S+/tiny\.py: is no recipe; name a .*")
    part = tmp_path / "part.py"
    part.write_text("from jaxinfra.train.loop import TrainConfig\n\n\ndef config():\n    return TrainConfig()\n")
    refused(launch(*prepare, str(part)), r"\S+/part\.py: is neither a recipe nor a run; name a file such as .*")


def test_no_space(begun: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace_free(shutil.disk_usage("/"), 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    before = contents(begun.runs)
    refused(begun.launch(), r"\S+/runs/tiny: 1\.0 kB free, .* root=FOLDER .*checkpoint\.keep_last", 82)
    assert contents(begun.runs) == before


def replace_free(usage, free: int):
    return usage._replace(free=free)


def test_unwritable_root(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", denied)
    refused(tiny.launch(), r"\S+/runs/tiny: .*Permission denied.*", 82)
    assert not tiny.runs.exists()


def test_sample(tiny: Tiny, begun: Tiny, tmp_path: Path) -> None:
    refused(launch("sample", str(tmp_path), "w1"), r"\S+: no run\.json there; name the directory of a run, .*")
    shutil.rmtree(begun.directory() / "checkpoints")
    run_dir = str(begun.directory())
    refused(launch("sample", run_dir, "w1"), r"\S+/checkpoints: no checkpoint yet; train until the first .*", 79)
    (begun.directory() / "checkpoints").mkdir()
    refused(launch("sample", run_dir, "w1"), r"\S+/checkpoints: no checkpoint yet; train until the first .*", 79)
    for option, text in (("--temperature", "-1"), ("--top-k", "-1"), ("--top-p", "0"), ("--max-tokens", "0")):
        refused(launch("sample", run_dir, "w1", f"{option}={text}"), rf"{option} {text}\S*: must .*; use {option} .*")


@pytest.mark.parametrize("devices", ["nonsense", "cpu:0", "cpu:x", "gpu:2", ""])
def test_devices(tiny: Tiny, devices: str) -> None:
    refused(tiny.launch("--devices", devices), rf"--devices {devices}: expected cpu, cpu:N, gpu or tpu; use .* cpu:8")


def test_command_word() -> None:
    commands = "train, show, compile, data prepare, data show, data verify, data peek, sample, diff, parity, bench"
    unknown = rf"shwo: no such command and no such config; the commands are {commands}; did you mean show\?"
    refused(launch("shwo"), unknown)
    refused(launch("shwo", "config.py"), unknown)
    refused(launch("xyzzy"), rf"xyzzy: .* {commands}; a config is a file, such as configs/quickstart\.py")
    assert launch("show").code == 2
    assert launch().code == 2


def test_debug_shows_the_traceback(tiny: Tiny) -> None:
    for words in (["--debug", "train.stepz=1"], ["train.stepz=1", "--debug"]):
        ended = tiny.launch(*words)
        assert ended.code == ConfigError.exit_code
        assert ended.err.startswith("Traceback (most recent call last):\n")
        assert ended.err.endswith("error: train.stepz: no such field; did you mean train.steps?\n")


def test_lost_record(begun: Tiny) -> None:
    """Without run.json a checkpoint still tells what config it is of."""
    (begun.directory() / "run.json").unlink()
    edited = begun.edited("peak_lr=3e-3", "peak_lr=4e-3")
    refused(begun.launch(config=edited), r"\S+/runs/tiny: holds a run of another config: optim\.peak_lr is .*")


def test_two_starts_of_one_run(begun: Tiny) -> None:
    """The second is refused while the first goes on, and touches nothing."""
    holder = os.open(begun.directory(), os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    before = contents(begun.runs)
    refused(begun.launch(), r"\S+/runs/tiny: another process is training this run; wait for it, or use name=ANOTHER")
    assert contents(begun.runs) == before
    os.close(holder)


def test_diverged_run_keeps_its_last_good_checkpoint(tiny: Tiny) -> None:
    """A run that is no longer numbers ends with its own code and saves nothing of it."""
    overrides = ("optim.peak_lr=1e30", "checkpoint.every=1", "name=diverged")
    refused(tiny.launch(*overrides), r"step \d+: (loss|grad_norm) is (nan|inf); nothing was saved since: .*", 80)
    kept = sorted(int(p.name) for p in (tiny.directory("diverged") / "checkpoints").iterdir() if p.name.isdecimal())
    with Checkpoints(tiny.directory("diverged") / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == kept and kept and max(kept) < 12


def test_run_that_never_made_a_step_blocks_nothing(tiny: Tiny) -> None:
    """A config that was refused while it was compiled can be mended under the same name."""
    refused(tiny.launch("model.attention=cudnn"), r"model\.attention=cudnn: refused: it does not run on cpu; .*")
    assert tiny.launch("optim.clip_norm=2.0", "name=tiny").code == 0
