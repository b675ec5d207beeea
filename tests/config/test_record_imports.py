"""A run record is data: what it names is imported only if the user names it, too."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.config import load, read_record, record, write_record
from jaxinfra.errors import ConfigError
from tests.config.user_class_files import HERE, MINE, Write, change, save
from tests.config.user_class_files import write as write
from tests.refusals import raises, refused
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

from .extended import Run


@pytest.fixture
def marker(write: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that malicious modules, on `sys.path` and in folders, write if they are imported."""
    marker = Path(os.path.abspath("marker"))
    evil = MINE.replace(
        "import Optimizer", f"import Optimizer\nopen({str(marker)!r}, 'w').close()\nfrom {HERE} import Run"
    )
    for name in ("path/evil.py", "path/package/__init__.py", "path/jaxinfra_evil.py", "configs/evil.py", "evil.py"):
        write(name, evil)
    write("runs/x/evil.py", evil)
    monkeypatch.syspath_prepend(os.path.abspath("path"))
    return marker


ATTACKS = [
    "os:system",
    "subprocess:Popen",
    "builtins:eval",
    "__main__:Mine",
    "evil:Mine",
    "package:Mine",
    "package.sub:Mine",
    "jaxinfra_evil:Mine",
    "jaxinfra.config.source:os.system",
    "jaxinfra.config.source:Path",
    "jaxinfra.config.record:Loaded",
    "jaxinfra.config.source:load",
    "jaxinfra..evil:Mine",
    "jaxinfra.config.:Mine",
    "evil.py:Mine",
    "../evil.py:Mine",
    "configs/evil.py:Mine",
    "configs/../evil.py:Mine",
    "..evil:Mine",
    ".evil:Mine",
    "path/evil.py:Mine",
    "evil.py:__init__.__globals__",
    ":Mine",
    "evil:",
    "",
    "\n",
    None,
    3,
    ["evil:Mine"],
    {"evil": "Mine"},
]


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("key", ["root", "kind", "classes"])
def test_a_record_imports_only_what_the_user_names(write: Write, marker: Path, name: Any, key: str) -> None:
    config = f"from {HERE} import Run\nconfig = lambda: Run()"
    content = save(write("named/mine.py", config), to="runs/x/run.json")
    if key == "root":
        content["root"] = name
    elif key == "kind":
        content["config"]["optimizer"] = {"kind": name}
    else:
        content["classes"] = {str(name): {"file": "evil.py", "sha256": "0" * 16}}
    write_record("runs/x/run.json", content)
    modules = set(sys.modules)
    for root in (None, Run) if key != "root" else (None,):
        for imports in ([HERE], [HERE, "named/mine.py"], [HERE, "named/"]):
            with raises(ConfigError, "runs/x/run.json:"):
                load("runs/x/run.json", (), root, imports)
    assert {each for each in set(sys.modules) - modules if not each.startswith("jaxinfra.")} == set()
    assert not marker.exists()


def test_a_record_may_import_from_a_folder_that_the_user_names(write: Write, marker: Path) -> None:
    save("runs/x/evil.py", to="run.json")
    marker.unlink()
    with raises(ConfigError, f"evil.py:Mine {os.path.abspath('runs/x/evil.py')}: --import"):
        load("run.json", imports=[HERE])
    assert not marker.exists()
    assert load("run.json", imports=[HERE, "runs/x/"]).run.optimizer.beta == 0.25
    assert marker.exists()


@pytest.mark.parametrize("file", ["evil.py", "/", "", "x", "a/b/c/d.py", "./evil.py"])
def test_a_recorded_file_that_does_not_fit_its_module_is_only_shown(write: Write, marker: Path, file: str) -> None:
    write_record(
        "run.json", save(write("mine.py", MINE)) | {"classes": {"a.b.c.d.e:X": {"file": file, "sha256": None}}}
    )
    with raises(ConfigError, "run.json: a.b.c.d.e:X"):
        load("run.json", imports=[HERE])
    assert not marker.exists()


@pytest.mark.parametrize("classes", [None, [], 3, {"a:B": None}, {"a:B": {}}, {"a:B": {"file": 3, "sha256": 4}}])
def test_damaged_sources_in_a_record_are_refused(write: Write, classes: Any) -> None:
    save(write("mine.py", MINE))
    change("classes", classes)
    with raises(ConfigError, "run.json: classes restore"):
        load("run.json", imports=[HERE, "mine.py"])


@pytest.mark.parametrize(
    ("named", "expected"),
    [("nowhere.py", "nowhere.py"), ("nowhere/", "nowhere/"), ("no.such", "no.such"), ("..x", "..x"), ("", "module")],
)
def test_errors_of_imports(write: Write, named: str, expected: str) -> None:
    save(write("mine.py", MINE))
    with raises(ConfigError, "--import", expected):
        load("run.json", imports=[named])


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"format": ' + b"9" * 6000 + b"}", b'{"format": "\xff"}'],
    ids=["too deep", "too long a number", "not UTF-8"],
)
def test_hostile_json_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a run record") as refused:
        read_record(path)
    assert "\n" not in str(refused.value)


# On the command line.


@pytest.mark.parametrize("command", ["train", "show", "data peek", "data prepare"])
def test_commands_refuse_a_record_with_classes_that_the_user_does_not_name(
    write: Write, marker: Path, tiny: Tiny, command: str
) -> None:
    content = record(load(tiny.config), command=[], versions={}, git={}, devices=[])
    for changes in ({"root": "evil:Mine"}, {"classes": {"evil:Mine": {"file": None, "sha256": None}}}):
        write_record("run.json", content | changes)
        if command == "show" and "classes" in changes:
            assert launch("show", "run.json").code == 0, "a record is shown without its classes"
        else:
            refused(launch(*command.split(), "run.json"), "run.json: evil:Mine: --import evil")
    assert not marker.exists()
    assert "--import MODULE|FILE" in launch(*command.split(), "--help").out


def test_sample_refuses_a_record_with_classes_that_the_user_does_not_name(
    write: Write, marker: Path, tiny: Tiny
) -> None:
    content = record(load(tiny.config), command=[], versions={}, git={}, devices=[])
    write_record("run.json", content | {"classes": {"evil:Mine": {"file": None, "sha256": None}}})
    refused(launch("sample", ".", "w1"), "run.json: evil:Mine: --import evil")
    assert not marker.exists()


def test_a_record_runs_no_recipe_that_the_user_does_not_name(write: Write, tiny: Tiny, tmp_path: Path) -> None:
    recipe = write("my recipe.py", "open('marker', 'w').close()\nconfig = lambda: None")
    overrides = [f"data.recipe={str(recipe)!r}"]
    write_record("run.json", record(load(tiny.config, overrides), command=[], versions={}, git={}, devices=[]))
    for source in ("run.json", ".", os.getcwd()):
        line = refused(launch("data", "prepare", source), f"{source}: --import")
        assert not Path("marker").exists()
        words = shlex.split(line.rpartition("launch ")[2])
        assert words == ["data", "prepare", source, "--import", "my recipe.py"]
        missing = refused(launch("data", "peek", source, "data.store=none"), "none: data prepare")
        assert [*words, "data.store=none"] == shlex.split(missing.rpartition("launch ")[2])
    refused(launch(*words), "recipe.py: config() NoneType")
    assert Path("marker").exists()
