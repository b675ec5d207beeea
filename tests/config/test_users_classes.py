"""Classes of users: in a config file, in modules beside it, in packages; in records, and found again for a replay."""

import os
import textwrap
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.config import diff, dump, load, read_record, record, validate, write_record
from jaxinfra.errors import ConfigError
from tests.refusals import raises

from . import extended
from .extended import Run

HERE = extended.__name__
MINE = f"""
from __future__ import annotations
from dataclasses import dataclass
from {HERE} import Optimizer, Run

@dataclass(frozen=True, kw_only=True)
class Mine(Optimizer):
    beta: float = 0.5
    limit: Limit | None = None

    def step(self, x):
        return x * FACTOR

@dataclass(frozen=True, kw_only=True)
class Limit:
    above: int = 1

@dataclass(frozen=True, kw_only=True)
class Second(Mine):
    more: tuple[int, ...] = ()

FACTOR = 3

def config():
    return Run(optimizer=Mine(beta=0.25))
"""
SIBLING = f"""
from __future__ import annotations
from dataclasses import dataclass
from {HERE} import Optimizer, Run

@dataclass(frozen=True, kw_only=True)
class Mine(Optimizer):
    beta: Beta = 0.5
    limit: Limit | None = None

    def step(self, x):
        return x * FACTOR

@dataclass(frozen=True, kw_only=True)
class Limit:
    above: int = 1

type Beta = float
FACTOR = 3
"""
USES_SIBLING = f"""
import opt
from {HERE} import Run

def config():
    return Run(optimizer=opt.Mine(beta=0.25))
"""

type Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


def save(source: str | Path, overrides: tuple[str, ...] = (), to: str = "run.json") -> dict[str, Any]:
    """Writes and returns the record of a config."""
    content = record(load(source, overrides), command=[], versions={}, git={}, devices=[])
    write_record(to, content)
    return content


def change(key: str, value: Any, path: str = "run.json") -> None:
    """Changes a record."""
    write_record(path, read_record(path) | {key: value})


def digest(path: str | Path) -> str:
    return sha256(Path(path).read_bytes()).hexdigest()[:16]


# In the config file itself.


def test_a_class_of_the_config_file_is_named_by_the_file(write: Write) -> None:
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
