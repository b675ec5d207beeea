"""Slow comparisons of numbers, which are not computed again while their programs are those for which they passed.

`proofs.json` has a hash for each slow test: of its lowered programs, of JAX, and of the test's code.
`python tests/golden/write.py parity` writes it. A changed program, or another JAX, computes its comparison again.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from filelock import FileLock

from jaxinfra.bench import parity
from jaxinfra.program import Program
from tests.golden.compiled import no_source_lines, write_json

FOLDER = Path(__file__).parent
PROOFS = FOLDER / "proofs.json"
RECORD = "RECORD_PARITY"
"""The environment variable with the file into which slow tests that pass are recorded; they are all computed then."""

type Unless = Callable[..., None]


@pytest.fixture
def unless_proven(request: pytest.FixtureRequest) -> Unless:
    """Calls a check of the numbers of some programs; a slow test leaves it out if these programs have passed it."""

    def run(check: Callable[[], None], *programs: Program) -> None:
        if request.node.get_closest_marker("slow") is None:
            check()
            return
        name = request.node.nodeid.rpartition("/")[2]
        found = fingerprint(request.path, programs)
        recorded_into = os.environ.get(RECORD)
        if recorded_into is None and json.loads(PROOFS.read_text(encoding="utf-8")).get(name) == found:
            return
        check()
        if recorded_into is not None:
            record(Path(recorded_into), name, found)

    return run


def fingerprint(test: Path, programs: tuple[Program, ...]) -> str:
    """Hashes the train steps of programs with the order of their devices, the compiler's mode, and the test's code."""
    code = [path.read_text(encoding="utf-8") for path in (test, FOLDER / "cases.py", Path(parity.__file__))]
    mode = [os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"], version("jax"), version("jaxlib")]
    return hashlib.sha256(repr([*code, *mode, *map(lowered, programs)]).encode()).hexdigest()


@functools.cache
def lowered(program: Program) -> str:
    """Returns a hash of the lowered train step, which has the gradients, and of the order of the devices."""
    with no_source_lines():
        text = program.lower().as_text()
    devices = [device.id for device in program.mesh.devices.flat]
    return hashlib.sha256(f"{devices} {text}".encode()).hexdigest()


def record(path: Path, name: str, found: str) -> None:
    """Adds a test that has passed to a file, into which other processes may write, too."""
    with FileLock(f"{path}.lock"):
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, before | {name: found})


def record_all() -> None:
    """Runs the slow tests, and records those that pass in place of those that have passed before."""
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "proofs.json")
        words = ["-q", "-n", "2", "-m", "slow", str(FOLDER)]
        subprocess.run([sys.executable, "-m", "pytest", *words], env={**os.environ, RECORD: str(new)}, check=True)
        write_json(PROOFS, json.loads(new.read_text(encoding="utf-8")))
