"""User classes in a config file, in modules beside it and in packages; their records, and replays of these."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.config import diff, dump, load, read_record, record, validate, write_record
from jaxinfra.config.classes import ClassFinder
from jaxinfra.config.record import decode_record
from jaxinfra.errors import ConfigError
from tests.config.user_class_files import HERE, MINE, SIBLING, USES_SIBLING, Write, digest, save
from tests.config.user_class_files import write as write
from tests.refusals import raises, refused
from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

from . import extended
from .extended import Run

# In the config file itself.


def test_a_class_of_the_config_file_is_named_after_the_file(write: Write) -> None:
    loaded = load(write("configs/mine.py", MINE), ["optimizer.limit=limit", "optimizer.limit.above=3"], Run)
    assert dump(loaded.run).splitlines()[:4] == [
        "optimizer = mine.py:Mine",
        "optimizer.beta = 0.25",
        "optimizer.limit = limit",
        "optimizer.limit.above = 3",
    ]
    assert loaded.origins["optimizer"] == "file:configs/mine.py"
    assert loaded.run.optimizer.step(2) == 6
    assert diff(load("configs/mine.py").run, load(os.path.abspath("configs/mine.py")).run) == []
    validate(loaded.run)


def test_an_override_names_another_class_of_the_file(write: Write) -> None:
    run = load(write("configs/mine.py", MINE), ["optimizer=mine.py:Second", "optimizer.more=1,2"]).run
    assert (run.optimizer.beta, run.optimizer.more) == (0.25, (1, 2))
    with raises(ConfigError, "optimizer=mine.py:Third: Third"):
        load("configs/mine.py", ["optimizer=mine.py:Third"])
    with raises(ConfigError, "optimizer=other.py:Mine: other.py"):
        load("configs/mine.py", ["optimizer=other.py:Mine"])


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("def step(self, x):", "def stepp(self, x):", "mine.py:25: mine.py:Mine step Optimizer"),
        ("@dataclass(frozen=True, kw_only=True)\nclass Mine", "class Mine", "mine.py:24: mine.py:Mine @dataclass("),
        ("class Mine(Optimizer)", "class Mine", f"optimizer=mine: Mine inherit {HERE}:Optimizer"),
        ("limit: Limit", "limit: Unknown", "Mine Unknown mine.py"),
        ("limit: Limit", "limit: dict", "Mine.limit: dict"),
        ("return x * FACTOR", "return x *", "mine.py:12: SyntaxError"),
    ],
)
def test_errors_of_a_class_in_the_file(write: Write, old: str, new: str, named: str) -> None:
    assert old in MINE
    with raises(ConfigError, named):
        load(write("mine.py", MINE.replace(old, new)))


# In modules beside the config file.


@pytest.mark.parametrize("package", [False, True])
def test_a_config_file_imports_its_siblings_from_any_working_directory(write: Write, package: bool) -> None:
    if package:
        write("configs/opt/__init__.py", "from opt.mine import Mine")
    write("configs/opt/mine.py" if package else "configs/opt.py", SIBLING)
    write("opt.py", "raise RuntimeError('must not be found')")
    path, finders, modules = [*sys.path], [*sys.meta_path], set(sys.modules)
    run = load(write("configs/mine.py", USES_SIBLING), ["optimizer.limit=limit"]).run
    assert dump(run).startswith(f"optimizer = opt{'.mine' if package else ''}:Mine\noptimizer.beta = 0.25\n")
    assert run.optimizer.step(2) == 6
    assert (sys.path, sys.meta_path, set(sys.modules)) == (path, finders, modules)
    assert not Path("configs/__pycache__").exists()


def test_an_override_names_a_class_of_a_sibling(write: Write) -> None:
    write("configs/opt.py", SIBLING)
    for text in (USES_SIBLING, MINE):
        run = load(write("configs/mine.py", text), ["optimizer=opt:Mine", "optimizer.limit=limit"]).run
        assert run.optimizer.beta == 0.25 and run.optimizer.limit.above == 1


def test_modules_of_the_same_name_in_two_folders_do_not_mix(write: Write) -> None:
    for folder, factor in (("one", 1), ("two", 2)):
        write(f"{folder}/opt.py", SIBLING.replace("FACTOR = 3", f"from more import FACTOR\nassert FACTOR == {factor}"))
        write(f"{folder}/more.py", f"FACTOR = {factor}")
        write(f"{folder}/mine.py", USES_SIBLING)
    one, two, again = (load(f"{folder}/mine.py").run for folder in ("one", "two", "one"))
    assert [run.optimizer.step(1.0) for run in (one, two, again)] == [1.0, 2.0, 1.0]
    assert type(one.optimizer) is not type(two.optimizer)
    nested = write(
        "one/nested.py",
        "import opt\nfrom jaxinfra.config import load\ndef config():\n    other = load('two/mine.py').run\n"
        f"    from more import FACTOR\n    assert FACTOR == 1\n    from {HERE} import Run\n"
        "    return Run(optimizer=opt.Mine(), maybe=other.optimizer)\n",
    )
    run = load(nested).run
    assert (run.optimizer.step(1.0), run.maybe.step(1.0)) == (1.0, 2.0)
    files = {name: source["file"] for name, source in save(nested)["classes"].items() if name == "opt:Mine"}
    assert files["opt:Mine"].endswith("opt.py")


@pytest.mark.parametrize("name", ["random", "sys", "jaxinfra", "numpy", "annotated_types"])
def test_a_sibling_never_hides_python_or_an_installed_package(write: Write, name: str) -> None:
    write(f"configs/{name}.py", "raise RuntimeError('must not be found')")
    check = f"    import {name}\n    assert not {name}.__spec__.origin.startswith('{os.getcwd()}')\n"
    load(write("configs/mine.py", MINE.replace("def config():\n", f"def config():\n{check}")))


def test_a_sibling_on_sys_path_stays_imported(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("configs/anyway.py", SIBLING)
    monkeypatch.syspath_prepend(os.path.abspath("configs"))
    run = load(write("configs/mine.py", USES_SIBLING.replace("import opt", "import anyway as opt"))).run
    assert type(run.optimizer) is sys.modules.pop("anyway").Mine


def test_errors_in_a_sibling_name_its_line(write: Write) -> None:
    write("configs/opt.py", "x = 1\ny = 1 / 0\n")
    with raises(ConfigError, "configs/opt.py:2: ZeroDivisionError"):
        load(write("configs/mine.py", USES_SIBLING))
    write("configs/opt.py", "x = (\n")
    with raises(ConfigError, "configs/mine.py:2: SyntaxError opt.py"):
        load("configs/mine.py")
    with raises(ConfigError, "mine.py:1: ModuleNotFoundError: absent"):
        load(write("configs/mine.py", "import absent"))
    with raises(ConfigError, "mine.py:1: jaxinfra.models.zoo docs/changelog.md"):
        load(write("configs/mine.py", "from jaxinfra.models.zoo import shape"))
    with raises(ConfigError, "mine.py:1: ImportError"):
        load(write("configs/mine.py", "from . import opt"))


# In a record.


def test_a_record_has_the_source_of_every_user_class(write: Write) -> None:
    content = save(write("configs/mine.py", MINE), ("optimizer=mine.py:Second", f"maybe={HERE}:Steeper"))
    mine = {"file": os.path.abspath("configs/mine.py"), "sha256": digest("configs/mine.py")}
    here = {"file": extended.__file__, "sha256": digest(extended.__file__)}
    assert content["classes"] == {
        **{f"{HERE}:{name}": here for name in ("Run", "Optimizer", "AdamW", "Steeper")},
        **{f"mine.py:{name}": mine for name in ("Second", "Mine")},
    }
    assert content["config"]["optimizer"]["kind"] == "mine.py:Second"
    assert "Mine" not in json.dumps(content["origins"])


@pytest.mark.parametrize("named", ["configs/mine.py", "configs/", "configs/other.py"])
def test_replay_of_a_class_of_a_config_file(write: Write, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write("configs/other.py", "raise RuntimeError('must not be run')")
    save(write("configs/mine.py", MINE), ("optimizer.beta=0.75", "optimizer.limit=limit"))
    replay = load("run.json", ["optimizer.limit.above=4"], Run, [HERE, named])
    assert (replay.run.optimizer.beta, replay.run.optimizer.limit.above) == (0.75, 4)
    assert replay.run.optimizer.step(2) == 6 and dump(replay.run).startswith("optimizer = mine.py:Mine")
    write_record("again.json", record(replay, command=[], versions={}, git={}, devices=[]))
    assert read_record("again.json")["classes"] == read_record("run.json")["classes"]
    monkeypatch.chdir("configs")
    assert dump(load("../again.json", (), Run, [HERE, f"../{named}"]).run) == dump(replay.run)


@pytest.mark.parametrize("named", ["configs/mine.py", "configs/opt.py"])
def test_replay_of_a_class_of_a_sibling(write: Write, named: str) -> None:
    write("configs/opt.py", SIBLING)
    save(write("configs/mine.py", USES_SIBLING), ("optimizer.limit=limit",))
    with raises(ConfigError, f"opt:Mine {os.path.abspath('configs/opt.py')}: --import {os.path.abspath('configs')}/"):
        load("run.json", imports=[HERE])
    assert load("run.json", imports=[HERE, named]).run.optimizer.step(2) == 6
    write("configs/opt.py", SIBLING + "\n")
    with raises(ConfigError, f"run.json: {os.path.abspath('configs/opt.py')} changed opt:Mine restore"):
        load("run.json", imports=[HERE, named])


def test_replay_of_a_class_of_a_package(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("lib/mypackage/__init__.py", "")
    write("lib/mypackage/parts.py", MINE)
    monkeypatch.syspath_prepend(os.path.abspath("lib"))
    try:
        save(write("mine.py", f"from {HERE} import Run\nconfig = lambda: Run()"), ("optimizer=mypackage.parts:Mine",))
        refused = (
            f"run.json: mypackage.parts:Mine {os.path.abspath('lib/mypackage/parts.py')}: --import mypackage.parts"
        )
        with raises(ConfigError, refused):
            load("run.json", imports=[HERE])
        for named in ("mypackage", "mypackage.parts"):
            assert load("run.json", imports=[HERE, named]).run.optimizer.step(2) == 6
    finally:
        for name in [name for name in sys.modules if name.startswith("mypackage")]:
            del sys.modules[name]


def test_replay_is_refused_if_the_file_is_missing_or_changed(write: Write) -> None:
    path = write("configs/mine.py", MINE)
    full = os.path.abspath(path)
    save(path)
    with raises(ConfigError, f"run.json: mine.py:Mine {full}: --import {full}"):
        load("run.json", imports=[HERE])
    write("configs/mine.py", MINE.replace("FACTOR = 3", "FACTOR = 4"))
    refused = f"run.json: {full} changed mine.py:Mine {digest(path)} restore the file, config file instead"
    with raises(ConfigError, refused):
        load("run.json", imports=[HERE, path])
    write("configs/mine.py", "")
    with raises(ConfigError, f"run.json: mine.py:Mine {full}: no class Mine; restore the file, config file instead"):
        load("run.json", imports=[HERE, path])
    path.unlink()
    with raises(ConfigError, f"run.json: mine.py:Mine {full}: gone; restore the file, config file instead"):
        load("run.json", imports=[HERE, "configs/"])
    with raises(ConfigError, "--import configs/mine.py: no such file"):
        load("run.json", imports=[HERE, path])
    write("configs/mine.py", MINE)
    assert load("run.json", imports=[HERE, path]).run.optimizer.step(2) == 6


def test_a_class_inside_a_function_is_shown_but_not_replayed(write: Write) -> None:
    inside = f"""
from dataclasses import dataclass
from {HERE} import Optimizer, Run

def config():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Optimizer):
        def step(self, x):
            return x
    return Run(optimizer=Mine())
"""
    save(write("mine.py", inside))
    with raises(ConfigError, "run.json: mine.py:config.<locals>.Mine top of its module"):
        load("run.json", imports=[HERE, "mine.py"])


def test_a_class_of_a_script_is_found_again_and_one_of_a_notebook_is_not(write: Write) -> None:
    write(
        "script.py",
        MINE
        + """
if __name__ == "__main__":
    from jaxinfra.config.record import Loaded, record, write_record
    loaded = Loaded(run=config(), source="python", origins={})
    write_record("run.json", record(loaded, command=[], versions={}, git={}, devices=[]))
""",
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "script.py"], check=True, env=environment)
    with raises(ConfigError, f"run.json: script.py:Mine {os.path.abspath('script.py')}: --import"):
        load("run.json", imports=[HERE])
    assert load("run.json", imports=[HERE, "script.py"]).run.optimizer.step(2) == 6
    subprocess.run([sys.executable, "-c", Path("script.py").read_text()], check=True, env=environment)
    with raises(ConfigError, "run.json: __main__:Mine: notebook module"):
        load("run.json", imports=[HERE, "script.py"])


def test_a_resumed_run_decodes_its_record_with_the_classes_of_its_config(write: Write) -> None:
    path = write("configs/mine.py", MINE)
    content = save(path)
    write("configs/mine.py", MINE.replace("beta=0.25", "beta=0.75"))
    run = load(path, (), Run).run
    before = decode_record("run.json", content, ClassFinder.from_config(run))
    assert [(each.path, each.left, each.right) for each in diff(before, run)] == [("optimizer.beta", 0.25, 0.75)]
    with raises(ConfigError, f"run.json: optimizer.kind: {HERE}:Mine: not use use name=ANOTHER"):
        content["config"]["optimizer"]["kind"] = f"{HERE}:Mine"
        decode_record("run.json", content, ClassFinder.from_config(run))


# On the command line.


def test_diff_compares_records_without_their_classes(write: Write) -> None:
    path = write("configs/mine.py", MINE)
    save(path, ("optimizer=mine.py:Second",))
    assert launch("diff", "run.json", "run.json").out == "no difference\n"
    write("configs/mine.py", MINE.replace("beta=0.25", "beta=0.75"))
    expected = [
        "optimizer mine.py:Second -> mine.py:Mine",
        "optimizer.beta 0.25 -> 0.75",
        "optimizer.more () -> absent",
    ]
    ended = launch("diff", "run.json", str(path))
    assert [" ".join(line.split()) for line in ended.out.splitlines()] == expected, ended
    refused(launch("diff", "run.json", "configs/nowhere.py"), "configs/nowhere.py mine.py")


OBJECTIVE = """
from dataclasses import dataclass
from jaxinfra.objectives.causal_lm import CausalLM

@dataclass(frozen=True, kw_only=True)
class Scaled(CausalLM):
    factor: float = 1.0

    def loss(self, apply, params, batch):
        total, sums = super().loss(apply, params, batch)
        return self.factor * total, sums

"""


@pytest.mark.slow
def test_a_run_with_a_class_of_its_config_file(tiny: Tiny) -> None:
    """It can be trained, resumed, shown, sampled from and replayed."""
    tiny.config.write_text(
        OBJECTIVE + tiny.config.read_text().replace('name="tiny",', 'name="tiny", objective=Scaled(),')
    )
    record, full, words = tiny.directory() / "run.json", os.path.abspath(tiny.config), ["train.steps=4", "name=tiny"]
    name = f"{tiny.config.name}:Scaled"
    assert tiny.launch(*words).code == 0
    assert name in read_record(record)["classes"]
    assert tiny.launch(*words).out.startswith("nothing to do")
    assert f"objective = {name}  # file:" in tiny.launch(command="show").out
    assert f"objective = {name}\n" in launch("show", str(record)).out
    for command in (["show", str(record), "seed=1"], ["sample", str(record.parent), "w1", "--max-tokens", "2"]):
        refused(launch(*command), f"run.json: {name} {full}: --import {full}")
        assert launch(*command, "--import", full).code == 0
    refused(launch(str(record), "name=again"), f"run.json: {name} {full}: --import {full}")
    assert launch(str(record), "name=again", "--import", full).code == 0
    assert tiny.losses("again") == tiny.losses()
    tiny.config.write_text(tiny.config.read_text() + "\n")
    refused(launch(str(record), "name=third", "--import", full), f"run.json: {full} changed {name}")
    assert tiny.launch(*words).out.startswith("nothing to do")
