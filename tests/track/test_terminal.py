"""Runs print readable lines in a real terminal (tmux): 80 and 200 columns wide, without colors, and a dumb one."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.track import demo

type Run = Callable[..., str]


@pytest.fixture
def in_tmux(tmp_path: Path) -> Iterator[Run]:
    """Runs the demo in a terminal, and returns its screen after the end, with colors as escape sequences."""
    if not shutil.which("tmux"):
        pytest.skip("needs tmux: apt-get install tmux")
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]

    def run(columns: int, *arguments: object, **environment: str) -> str:
        demo_file = tmp_path / "demo.py"
        demo_file.write_text(demo.RUN)
        words = [sys.executable, str(demo_file), "auto", str(tmp_path / "run"), *map(str, arguments)]
        variables = [f"{name}={value}" for name, value in {"PYTHONPATH": str(demo.ROOT), **environment}.items()]
        command = shlex.join(["env", *variables, *words]) + "; echo THE END; sleep 60"
        size = ["-x", str(columns), "-y", "60"]
        clean = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "TMUX")}
        subprocess.run([*tmux, "new-session", "-d", *size, command], check=True, env=clean)
        deadline_s = time.monotonic() + 600
        screen = ""
        while "THE END" not in screen:
            assert time.monotonic() < deadline_s, screen
            time.sleep(0.1)
            shown = subprocess.run([*tmux, "capture-pane", "-p", "-e"], capture_output=True, text=True, check=True)
            screen = shown.stdout
        subprocess.run([*tmux, "kill-server"], check=True)
        return screen

    yield run
    subprocess.run([*tmux, "kill-server"], stderr=subprocess.DEVNULL, check=False)


@pytest.mark.parametrize("columns", [80, 200])
def test_lines_of_evaluations_and_saves_stay_and_nothing_is_cut(in_tmux: Run, columns: int) -> None:
    screen = in_tmux(columns, 40, 0.01)
    lines = screen.splitlines()
    validation = next(line for line in lines if "validation" in line)
    assert "step 20/40  validation  loss 3.2500" in validation and "\x1b[32m" in validation, "in green"
    assert any("saving" in line for line in lines)
    assert any("parameters" in line and "12.3 M" in line for line in lines)
    assert any("Validation bits per byte" in line and "1.5000" in line for line in lines)
    assert not any("compiling" in line or "━" in line for line in lines), "the bar is gone"


def test_without_colors(in_tmux: Run) -> None:
    screen = in_tmux(80, 40, 0.01, NO_COLOR="1")
    assert "step 20/40  validation  loss 3.2500" in screen and "\x1b[32m" not in screen


def test_a_dumb_terminal_gets_lines(in_tmux: Run) -> None:
    screen = in_tmux(200, 40, 0.01, TERM="dumb")
    assert (
        "step 10/40  loss  3.4100" in screen and "step 40/40" in screen and "\x1b[" not in screen.partition("step")[2]
    )
