"""`load` and the record of a run: files, errors with their lines, origins, replay."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jaxinfra.config import encode, load, read_record, record, write_record
from jaxinfra.errors import ConfigError, StorageError
from tests.refusals import raises

from .trees import WSD, CosineDecay, Run, Train

TREES = Run.__module__
GOOD = f"""
from {TREES} import Run, Optim, WSD, Train

def config():
    return Run(name="good", train=Train(steps=7), optim=Optim(peak_lr=1))
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="good.py"):
        (tmp_path / name).write_text(textwrap.dedent(text))
        return name

    return write


def replayable(source="good.py", overrides=()):
    return record(
        load(source, overrides),
        command=["train", source],
        versions={"jax": "1"},
        git={"commit": None, "dirty": None},
        devices=[],
    )


def test_load_applies_overrides(write):
    loaded = load(write(GOOD), ["train.global_batch=16", "optim.schedule=wsd", "optim.schedule.decay_steps=3"])
    assert loaded.run.train == Train(steps=7, global_batch=16)
    assert loaded.run.optim.schedule == WSD(warmup_steps=10, decay_steps=3)
    assert type(loaded.run.optim.peak_lr) is float
    assert loaded.source == "good.py"


def test_origins(write):
    overrides = ["train.global_batch=16", "optim.schedule=wsd", "mesh.tensor=1"]
    assert load(write(GOOD), overrides).origins == {
        "name": "file:good.py",
        "train.steps": "file:good.py",
        "train.global_batch": "command line",
        "optim.peak_lr": "file:good.py",
        "optim.schedule": "command line",
        # Kept from the class that was chosen before; not a default of the new one.
        "optim.schedule.warmup_steps": "file:good.py",
    }


def test_origins_of_a_value_set_back_or_set_again(write):
    origins = load(write(GOOD), ["train.steps=100", "optim.peak_lr=2"]).origins
    assert "train.steps" not in origins
    assert origins["optim.peak_lr"] == "command line"


def test_loading_does_not_change_the_interpreter(write, tmp_path):
    write("raise RuntimeError('broken')", "sibling.py")
    path, modules, finders = list(sys.path), set(sys.modules), list(sys.meta_path)
    load(write(GOOD))
    with raises(ConfigError, "sibling.py:1: broken"):
        load(write("import sibling", "bad.py"))
    assert (sys.path, sys.meta_path) == (path, finders)
    assert set(sys.modules) == modules
    assert not (tmp_path / "__pycache__").exists()


def test_string_annotations_of_classes_in_the_file_are_resolved(write):
    loaded = load(
        write("""
        from __future__ import annotations
        from dataclasses import dataclass, field

        @dataclass(frozen=True, kw_only=True)
        class Part:
            size: int | None = 3

        @dataclass(frozen=True, kw_only=True)
        class Whole:
            part: Part = field(default_factory=Part)

        def config():
            return Whole()
        """),
        ["part.size=none"],
    )
    assert loaded.run.part.size is None
    assert loaded.origins == {"part.size": "command line"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("x = (\n", "good.py:1: SyntaxError"),
        ("x = 1\n  y = 2\n", "good.py:2: IndentationError"),
        ("x = 1\ny = 1 / 0\n", "good.py:2: ZeroDivisionError"),
        ("def config():\n    return {}['a']\n", "good.py:2: KeyError: 'a'"),
        ("def config():\n    raise ValueError('a\\nb')\n", "good.py:2: ValueError: a b"),
        ("def config():\n    raise ValueError\n", "good.py:2: ValueError"),
        ("import json\ndef config():\n    return json.loads('{')\n", "good.py:3: JSONDecodeError"),
        ("x = 1\n", "good.py: config()"),
        ("config = 1\n", "good.py: config()"),
        ("def config(size, *, depth, width=1): ...\n", "good.py: config() size, depth"),
        ("def config(): return {}\n", "good.py: config() dict"),
        ("def config(): pass\n", "good.py: config() NoneType"),
        (f"from {TREES} import Run\ndef config(): return Run\n", "good.py: config() type"),
        (f"from {TREES} import Train\ndef config(): return Train()\n", "good.py: Run, Train"),
        (f"from {TREES} import Run\ndef config(): return Run(name=1)\n", "name=1: str"),
        (f"from {TREES} import Train\ndef config(): return Train(max_steps=1)\n", "good.py:2: max_steps train.steps"),
    ],
)
def test_errors_in_a_file(write, text, named):
    with raises(ConfigError, named):
        load(write(text), root=Run)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("god.py", "god.py: good.py?"),
        ("good", "good: good.py?"),
        ("run.json", "run.json: *.json"),
        ("nowhere/good.py", "nowhere/good.py: nowhere *.py"),
        ("notes.txt", "notes.txt: .py run.json"),
        (".", ".: directory"),
    ],
)
def test_errors_about_the_path(write, source, named):
    write(GOOD)
    write("", "notes.txt")
    write(GOOD, "tiny.py")
    with raises(ConfigError, named):
        load(source)


def test_a_record_replays_without_the_config_file(write, tmp_path):
    content = replayable(write(GOOD), ["optim.schedule=wsd"])
    write_record("run.json", content)
    os.unlink("good.py")
    replay = load("run.json", imports=[TREES])
    assert replay.run == decode_free_run(content)
    assert replay.source == "run.json"
    assert replay.origins["optim.schedule"] == "file:run.json"
    changed = load(tmp_path / "run.json", ["train.steps=9", "optim.schedule=cosine_decay"], Run, [TREES])
    assert changed.run.train.steps == 9
    assert changed.run.optim.schedule == CosineDecay()
    assert changed.origins["train.steps"] == "command line"


def decode_free_run(content):
    """Builds the config of the record without the decoder under test."""
    assert content["config"]["optim"]["schedule"]["kind"] == "wsd"
    return Run(
        name="good", train=Train(steps=7), optim=type(Run(name="x").optim)(peak_lr=1.0, schedule=WSD(warmup_steps=10))
    )


def test_the_contents_of_a_record(write):
    content = replayable(write(GOOD), ["train.steps=9"])
    assert content["format"] == 1
    assert content["root"] == f"{TREES}:Run"
    assert content["config"] == encode(load("good.py", ["train.steps=9"]).run)
    assert content["origins"]["train.steps"] == "command line"
    assert content["command"] == ["train", "good.py"]
    assert content["created"].endswith("+00:00")
    write_record("run.json", content)
    assert read_record("run.json") == content
    assert '\n "format": 1' in Path("run.json").read_text()


def test_a_failed_write_keeps_the_old_record(write, tmp_path, monkeypatch):
    content = replayable(write(GOOD))
    write_record("run.json", content)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with raises(StorageError, "run.json: No space left"):
        write_record("run.json", {"format": 1})
    assert read_record("run.json") == content
    assert sorted(os.listdir(tmp_path)) == ["good.py", "run.json"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{\n"a": }', "run.json:2:"),
        ("[]", "run.json: format"),
        ("{}", "run.json: format"),
        ('{"format": 2}', "run.json: format=2 1 upgrade"),
        ('{"format": 1, "root": "a:B"}', "run.json: config"),
        ('{"format": 1, "root": "no.such:Run", "config": {}}', "run.json: root=no.such:Run"),
        ('{"format": 1, "root": "os:system", "config": {}}', "run.json: root=os:system"),
        (json.dumps({"format": 1, "root": f"{TREES}:Run", "config": {}}), "run.json: name: str"),
    ],
)
def test_errors_in_a_record(write, text, named):
    write(text, "run.json")
    with raises(ConfigError, named):
        load("run.json", imports=[TREES])


def test_a_missing_record():
    with raises(ConfigError, "nowhere.json run.json"):
        read_record("nowhere.json")


def test_importing_config_does_not_import_jax(pytestconfig):
    code = "import sys, jaxinfra.config; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True
    )
    assert not {"jax", "numpy", "flax", "asyncio", "subprocess"} & set(done.stdout.split())
