"""What a config stands for changes only on purpose; the same run gives the same bits in every process."""

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden.first_losses import main
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


def test_another_process_computes_the_same_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With emulated devices, microbatches, and a compile cache of its own."""
    main()
    here = capsys.readouterr().out
    there = subprocess.run(
        [sys.executable, "-m", "tests.golden.first_losses"],
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path)},
        cwd=CONFIGS.parent,
        capture_output=True,
        text=True,
    )
    assert there.returncode == 0, there.stderr
    assert there.stdout == here and len(here.splitlines()) == 4
