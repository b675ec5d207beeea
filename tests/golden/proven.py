"""Comparisons of numbers, which are not computed again while their programs are those for which they have passed.

`numbers.json` has a hash for each such test: of its lowered programs, of JAX, and of the test's code.
`python tests/golden/write.py parity` writes it. A changed program, or another JAX, computes its comparison again.

It also has a hash of the code from which all programs follow. Where that is the recorded one, none is lowered.
"""

import ast
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

import jax
import pytest
from filelock import FileLock

from jaxinfra.machine.compile_cache import cpu_features
from jaxinfra.parity import meshes
from jaxinfra.program import Program
from tests.golden.compiled import no_source_lines, write_json

TESTS = Path(__file__).parents[1]
PROOFS = Path(__file__).with_name("numbers.json")
CODE: dict[str, list[Path]] = {
    "parity": [TESTS / "parity/cases.py", Path(meshes.__file__)],
    "models": [TESTS / "models" / name for name in ("harness.py", "numpy_reference.py", "numpy_experts.py")],
}
"""Files whose code the tests of a folder run, too: a test is computed again when one of them changes."""
TESTED = ("parity", "models/test_gradients.py", "train/test_quantized_curve.py")
SOURCES = "sources"
"""The entry with the hash of all code."""
PACKAGES = (
    *("config", "data", "models", "objectives", "ops", "optim", "parallel", "program", "run"),
    *("families", "machine", "parity"),
)
"""The packages from which programs follow: ring 1 (pyproject.toml), and what makes a config or a mesh."""
HELPERS = ("conftest.py", "decoders.py", "tiny_run.py", "golden/proven.py", "golden/compiled.py")
HELPERS += ("models/conftest.py", "train/conftest.py", "bench/__init__.py")
"""Other files of the tests that the proven ones run."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "qwix", "numpy")
RECORD = "RECORD_PARITY"
"""The environment variable with another file, into which tests that pass are recorded."""

type Unless = Callable[..., None]


@pytest.fixture
def unless_proven(request: pytest.FixtureRequest) -> Unless:
    """Calls a check of the numbers of some programs, unless these programs have passed it.

    A test that runs with every supported JAX always computes.

    A check that calls other functions than the train step and the gradients, which are in it, says which: `also`. With
    all optimizations it depends on the CPU which products and sums are fused; `any_cpu` is for checks that allow it.
    """

    def run(check: Callable[[], None], *programs: Program, also: tuple[str, ...] = (), any_cpu: bool = False) -> None:
        if request.node.get_closest_marker("jax_range") is not None:
            check()
            return
        name, known, recorded = request.node.nodeid.rpartition("/")[2], read(PROOFS), os.environ.get(RECORD)
        if recorded is None:
            is_of_this_cpu = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "0" and not any_cpu
            if name in known and not is_of_this_cpu and known.get(SOURCES) == sources():
                return
        else:
            known |= read(Path(recorded))
        found = fingerprint(request.path, programs, also, any_cpu=any_cpu)
        if known.get(name) != found:
            check()
        if recorded is not None:
            record(Path(recorded), name, found)

    return run


def fingerprint(test: Path, programs: tuple[Program, ...], also: tuple[str, ...], *, any_cpu: bool) -> str:
    """Hashes programs, the compiler's mode and version, and the test's code."""
    code = [path.read_text(encoding="utf-8") for path in (test, *CODE.get(test.parent.name, []))]
    mode = [os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"], version("jax"), version("jaxlib")]
    if mode[0] == "0" and not any_cpu:
        mode.append(cpu_features())
    hashes = [lowered(program, also) for program in programs]
    return hashlib.sha256(repr([*code, *mode, *hashes]).encode()).hexdigest()


@functools.cache
def sources() -> str:
    """Hashes the code of these packages and tests, without comments and docstrings, and the versions of libraries."""
    package = TESTS.parent / "jaxinfra"
    files = [path for name in PACKAGES for path in sorted((package / name).rglob("*.py"))]
    files += [path for each in TESTED for path in sorted((TESTS / each).rglob("*.py")) or [TESTS / each]]
    files += [*sorted((package.parent / "configs").glob("*.py")), *(TESTS / name for name in HELPERS)]
    files += [*(path for paths in CODE.values() for path in paths)]
    texts = [(str(path.relative_to(package.parent)), code_of(path)) for path in files]
    return hashlib.sha256(repr((texts, [(name, version(name)) for name in LIBRARIES])).encode()).hexdigest()


def code_of(path: Path) -> str:
    """Returns the syntax tree of a file without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


OTHERS: dict[str, Callable[[Program], jax.stages.Lowered]] = {
    "eval_step": lambda program: jax.jit(program.eval_step).lower(program.params, program.validation_batch),
    "init": lambda program: jax.jit(program.init).lower(jax.random.key(0)),
}


@functools.cache
def lowered(program: Program, also: tuple[str, ...] = ()) -> str:
    """Returns a hash of the train step, which has the gradients, of others, and of the order of the devices."""
    with no_source_lines(), program.on_mesh:
        texts = [each.as_text() for each in (program.lower(), *(OTHERS[name](program) for name in also))]
    devices = [device.id for device in program.mesh.devices.flat]
    return hashlib.sha256(repr((devices, texts)).encode()).hexdigest()


def record(path: Path, name: str, found: str) -> None:
    """Adds a test that has passed to a file, into which other processes may write, too."""
    with FileLock(f"{path}.lock"):
        write_json(path, read(path) | {name: found})


def read(path: Path) -> dict[str, str]:
    """Reads the recorded hashes by test."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def record_all() -> None:
    """Runs the tests, and records those that pass, or whose programs are still those that have passed."""
    before = sources()
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "proofs.json")
        words = ["-q", "-n", "2", *(str(TESTS / each) for each in TESTED)]
        subprocess.run([sys.executable, "-m", "pytest", *words], env={**os.environ, RECORD: str(new)}, check=True)
        sources.cache_clear()
        if sources() != before:
            raise SystemExit("the code has changed meanwhile; record again")
        write_json(PROOFS, read(new) | {SOURCES: before})
