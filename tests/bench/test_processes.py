import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.bench.processes import CASES
from jaxinfra.cli.arguments import BENCHES
from tests.tiny_run import Tiny

TITLES = [
    "step, float32, fsdp=2",
    "process start to end of first step, warm compile cache",
    "SIGKILL of process 0 to exit code 76 of process 1",
    "SIGKILL of process 1 to exit code 76 of process 0",
    "restart after a SIGKILL to the next step",
    "SIGKILL to the next step, with --supervise",
]


def test_command_line_lists_every_part() -> None:
    assert BENCHES["processes"].parts == tuple(CASES)


@pytest.mark.slow(100)
def test_all_cases(tiny: Tiny, repo_root: Path, tmp_path: Path) -> None:
    out, overrides = tmp_path / "out.json", ("train.steps=1000", "train.eval_every=none")
    command = [sys.executable, "-m", "launch", "bench", "processes", *overrides, "--config", str(tiny.config)]
    command += ["--pairs", "1", "--json", str(out)]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == TITLES
    assert [row.get("ratio", 0) > 0 for row in rows] == [True, True, False, False, True, True]
    assert all(f"| {title} " in done.stdout for title in TITLES)
