"""What a config stands for changes only on purpose; the same run gives the same bits in every process."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.write import CONFIGS, FOLDER, dumps

NAMES = sorted(path.stem for path in CONFIGS.glob("*.py"))
HINT = "if that is meant, run `python tests/golden/write.py` and commit what it writes"


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return dumps()


@pytest.mark.parametrize("name", NAMES)
def test_config_is_what_it_was(name: str, found: dict[str, str]) -> None:
    path = FOLDER / f"{name}.txt"
    golden = path.read_text(encoding="utf-8") if path.exists() else ""
    if found[name] != golden:
        changes = difflib.unified_diff(golden.splitlines(), found[name].splitlines(), "golden", "now", "", "", 0, "")
        pytest.fail(f"configs/{name}.py stands for other values now; {HINT}:\n" + "\n".join(changes), pytrace=False)


def test_every_dump_has_its_config() -> None:
    left = {path.stem for path in FOLDER.glob("*.txt")} - set(NAMES)
    assert not left, f"dumps without a config: {left}; {HINT}"


def test_two_processes_compute_the_same_bits(tmp_path: Path) -> None:
    """With emulated devices, microbatches and no shared compile cache."""

    def start(cache: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.golden.first_losses"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / cache)},
            cwd=CONFIGS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    processes = [start("one"), start("other")]
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert len(printed[0][0].splitlines()) == 4
    assert printed[0][0] == printed[1][0]
