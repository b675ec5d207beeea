"""What a run prints works when it is pasted, with names of configs, own classes, spaces, and in other folders."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from jaxinfra.cli.main import parse_command_line
from tests.refusals import names, refused
from tests.tiny_run import Tiny, launch


@pytest.fixture
def named(begun: Tiny) -> Path:
    """Two runs of the config with overrides, the second of which is newer, and one that only begins like them."""
    for name in ("tiny-0a1b2c", "tiny-ffffff", "tiny-mesh"):
        shutil.copytree(begun.runs / "tiny", begun.runs / name)
    shutil.rmtree(begun.runs / "tiny")
    os.utime(begun.runs / "tiny-0a1b2c" / "run.json", (1e9, 1e9))
    return begun.runs / "tiny"


@pytest.mark.parametrize("command", ["report", "goodput", "checkpoints", "show --changed", "diff"])
def test_a_name_is_the_newest_run_of_its_config(named: Path, command: str) -> None:
    words = [str(named)] * (2 if command == "diff" else 1)
    ended = launch(*command.split(), *words)
    assert ended.code == 0, ended
    names(ended.err.splitlines()[0], f"{named}: {named}-ffffff newest 2")


def test_an_exact_name_and_what_deletes_take_no_other_run(named: Path) -> None:
    assert launch("checkpoints", f"{named}-0a1b2c").err == ""
    refused(launch("checkpoints", str(named), "prune"), f"{named} {named}-ffffff?")
    assert parse_command_line(["sample", f"{named}@10", "w1"]).run_dir == f"{named}-ffffff@10"


def test_records_are_shown_and_compared_without_their_classes(begun: Tiny) -> None:
    run = begun.runs / "tiny"
    record = json.loads((run / "run.json").read_text())
    file = begun.config.with_name("my own.py")
    file.write_text("raise SystemExit('must not run')")
    record["config"]["objective"] = {"kind": "own.py:Mine", "factor": 2.0}
    record["classes"] = {"own.py:Mine": {"file": str(file), "sha256": None}}
    (run / "run.json").write_text(json.dumps(record))
    shown = launch("show", str(run))
    assert shown.code == 0 and "objective = own.py:Mine\nobjective.factor = 2.0\n" in shown.out
    assert "state a device" in shown.out and "seed = 0" not in launch("show", str(run), "--changed").out
    compared = launch("diff", str(run), str(begun.config))
    assert compared.code == 0, compared
    rows = [line.split() for line in compared.out.splitlines()]
    assert ["objective", "own.py:Mine", "->", "causal_lm"] in rows
    assert all(not row[0].startswith("model.") for row in rows), rows
    line = refused(launch("sample", str(run), "w1 w2"), "--import")
    assert shlex.split(line.rpartition("launch ")[2]) == ["sample", str(run), "w1 w2", "--import", str(file)]


def test_the_printed_lines_of_a_run_work_from_everywhere(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """With relative paths, `..`, a link and spaces; the store is found from the record."""
    home = tiny.config.parent
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home)
    store = os.path.relpath(tiny.loaded().data.store, home)
    assert store.startswith("..")
    ended = tiny.launch("train.steps=2", "train.eval_every=2", "root=my runs", f"data.store={store}")
    assert ended.code == 0, ended
    commands = [line.partition("launch ")[2] for line in ended.out.splitlines() if "launch " in line]
    words = {each[0]: each for each in map(shlex.split, commands)}
    assert {"show", "runs", "sample"} == words.keys()
    run_dir = parse_command_line(words["sample"]).run_dir
    assert launch(*words["runs"]).code == 0 and Path(run_dir).parent == Path("my runs")
    monkeypatch.chdir("elsewhere")
    Path("link").symlink_to(home / run_dir)
    for place in (f"../{run_dir}", "../my runs/tiny", "link"):
        peeked = launch("data", "peek", place, "--rows", "1")
        assert peeked.code == 0 and peeked.out == launch("data", "peek", str(home / run_dir), "--rows", "1").out
