"""Tests of compiled programs that need no compiler while their programs are those for which they passed.

What a compiler makes of a program is the same on every machine. `compile/proofs.json` has a hash of the programs of
each test, the compilers, what reads their output, and the test itself. `python tests/golden/write.py compile` writes
it.
"""

import functools
import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxinfra.plan.topology import Topology
from jaxinfra.run import Run
from tests.golden.compiled import FOLDER, fingerprint, write_json

PROOFS = FOLDER / "proofs.json"
RECORD = "RECORD_PROOFS"
"""The environment variable with which tests are run to record that they passed."""
TESTS = ("tests/plan/test_memory.py", "tests/plan/test_aot.py", "tests/bench/test_llama.py")


def compiled_once(
    *programs: tuple[Run, Topology], code: Sequence[Path] = ()
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A test of these programs runs only if they, its file or other `code` are not what was recorded."""

    def decorated(test: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            source = "".join(path.read_text(encoding="utf-8") for path in (Path(inspect.getfile(test)), *code))
            found = [fingerprint(run, topology, source) for run, topology in programs]
            proof = hashlib.sha256(repr(found).encode()).hexdigest()
            if proofs().get(test.__name__) == proof:
                return
            test()
            if RECORD in os.environ:
                write_json(PROOFS, proofs() | {test.__name__: proof})

        return run

    return decorated


def proofs() -> dict[str, str]:
    """Reads the recorded hashes by test."""
    return json.loads(PROOFS.read_text(encoding="utf-8")) if PROOFS.exists() else {}


def record() -> None:
    """Runs the tests, and records those that pass."""
    environment = {**os.environ, RECORD: "1"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow", *TESTS], env=environment, check=True)
