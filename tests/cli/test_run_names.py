"""What a run prints works when it is pasted, with names of configs, own classes, spaces, and in other folders."""

import errno
import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.cli.main import parse_command_line
from jaxinfra.config import load
from jaxinfra.run import Run
from tests.refusals import names, refused
from tests.tiny_run import Tiny, contents, launch


@pytest.fixture
def named(begun: Tiny) -> Path:
    """Two runs of the config with overrides, the second of which is newer, and newer ones whose names begin like them.

    Of these, one has a word, one a date, one no readable record, and one, whose start was refused, no checkpoint.
    """
    text = (begun.runs / "tiny" / "run.json").read_text()
    fingerprint = json.loads(text)["fingerprint"]
    for name in ("tiny-0a1b2c", "tiny-ffffff", "tiny-mesh", "tiny-240501", "tiny-abcdef"):
        shutil.copytree(begun.runs / "tiny", begun.runs / name)
    for digits, time_s in (("0a1b2c", 1e9), ("ffffff", 1.1e9)):
        record = begun.runs / f"tiny-{digits}" / "run.json"
        record.write_text(text.replace(fingerprint, digits + fingerprint[6:]))
        os.utime(record, (time_s, time_s))
    (begun.runs / "tiny-abcdef" / "run.json").write_text(text[:200])
    (begun.runs / "tiny-eeeeee").mkdir()
    (begun.runs / "tiny-eeeeee" / "run.json").write_text(text.replace(fingerprint, "eeeeee" + fingerprint[6:]))
    shutil.rmtree(begun.runs / "tiny")
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
    options = parse_command_line(["sample", f"{named}@10", str(named), "--processes", "2"])
    assert options.run_dir == f"{named}-ffffff@10"
    assert options.argv == ["sample", options.run_dir, str(named), "--processes", "2"], "as other processes get it"


def test_a_start_takes_no_other_run(named: Path) -> None:
    """The newest run could be another one in each process, on each host and after each restart."""
    before = contents(named.parent)
    for words in ((), ("train.steps=20",), ("--processes", "2")):
        line = refused(launch(str(named), *words), f"{named}: {named}-ffffff?")
        assert shlex.split(line.rpartition("launch ")[2]) == [f"{named}-ffffff", *words], "the line to paste"
    assert contents(named.parent) == before
    assert parse_command_line([str(named), "--supervise"]).config == str(named)
    config = str(named.parents[1] / "tiny.py")
    line = refused(launch(config, "name=on", f"init={named}"), f"{named}: {named}-ffffff?")
    assert shlex.split(line.rpartition("launch ")[2]) == [config, "name=on", f"init={named}-ffffff"]


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


def test_a_model_that_writes_no_text_is_refused_without_its_class(begun: Tiny) -> None:
    run = begun.runs / "tiny"
    record = json.loads((run / "run.json").read_text())
    record["config"]["model"] = {"kind": "own.py:ConvLM", "vocab_size": 304, "layers": 2}
    record["classes"] = {"own.py:ConvLM": {"file": str(begun.config.with_name("own.py")), "sha256": None}}
    (run / "run.json").write_text(json.dumps(record))
    for words in ("sample", "w1"), ("hub export", str(run / "out")):
        line = refused(launch(*words[0].split(), str(run), words[1]), f"{run} own.py:ConvLM TransformerConfig")
        assert "--import" not in line


def test_sync_of_a_run_without_a_server_prints_the_whole_line(begun: Tiny) -> None:
    run = str(begun.runs / "tiny")
    line = refused(launch("runs", "sync", run), f"{run} track.mlflow.uri")
    printed = shlex.split(line.rpartition("launch ")[2].partition(";")[0])
    assert printed == ["runs", "sync", run, "track.mlflow.uri=http://127.0.0.1:5000"]
    refused(launch("runs", "sync", run, "track.mlflow.urk=http://h"), "track.mlflow.urk track.mlflow.uri?")
    refused(launch("runs", "sync", run, "track.mlflow.uri=h"), "track.mlflow.uri http://HOST:PORT")


def test_records_are_compared_as_they_were_given(begun: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where one stands nor a field that is newer than a record makes a difference."""
    home, run = begun.config.parent, begun.runs / "tiny"
    (home / "stores" / "x").mkdir(parents=True)
    (home / "elsewhere").mkdir()
    record = json.loads((run / "run.json").read_text())
    record["config"]["data"]["store"], record["folder"] = "stores/x", str(home)
    (run / "run.json").write_text(json.dumps(record))
    record["config"]["objective"] = {"kind": "own.py:Mine", "factor": 2.0}
    record["classes"] = {"own.py:Mine": {"file": str(home / "own.py"), "sha256": None}}
    del record["config"]["optim"]["offload"]
    (home / "old.json").write_text(json.dumps(record))
    monkeypatch.chdir(home / "elsewhere")
    compared = launch("diff", str(run), str(home / "old.json"))
    assert compared.code == 0 and all(row.startswith("objective") for row in compared.out.splitlines()), compared
    store = begun.loaded().data.store
    here = begun.edited(f"store={store!r}", "store='stores/x'")
    assert "store" not in launch("diff", str(run), str(here)).out
    assert "optim.offload = false" in launch("show", str(home / "old.json")).out


def test_a_store_is_taken_from_here_then_from_the_folder_of_the_record(
    begun: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copied project reads its own store, and a home where the user may not look is no error."""
    home, file, stat = begun.config.parent / "home", begun.runs / "tiny" / "run.json", os.stat
    copy = home.with_name("copy")
    for folder in (home, copy):
        (folder / "stores" / "x").mkdir(parents=True)
    (copy / "empty").mkdir()
    record = json.loads(file.read_text())
    record["config"]["data"]["store"], record["folder"] = "stores/x", str(home)
    file.write_text(json.dumps(record))

    def found(place: Path) -> str:
        monkeypatch.chdir(place)
        return load(file, root=Run).run.data.store

    assert (found(copy), found(copy / "empty")) == ("stores/x", str(home / "stores" / "x"))

    def private(path: Any, **options: Any) -> os.stat_result:
        if isinstance(path, str | Path) and str(path).startswith(str(home)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", private)
    assert found(copy / "empty") == "stores/x"


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
