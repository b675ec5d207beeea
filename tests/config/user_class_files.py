"""Config files with classes of their own, and the records of them."""

import textwrap
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.config import load, read_record, record, write_record

from . import extended

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
SIBLING = MINE.partition("@dataclass(frozen=True, kw_only=True)\nclass Second")[0].replace("beta: float", "beta: Beta")
SIBLING += """
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
