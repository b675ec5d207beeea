"""The tiny run, and one of it that waits to go on."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_run import Tiny, launch
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


@pytest.fixture(scope="session")
def stopped(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped between its checkpoints: it has something to lose. `../whole` is what it comes to."""
    folder = tmp_path_factory.mktemp("stopped")
    config = folder / "tiny.py"
    made = tiny_data / "tiny.py"
    config.write_text(made.read_text().replace(str(tiny_data / "runs"), str(folder / "runs")))
    assert launch(str(config), "track.console=off").code == 0
    shutil.copytree(folder / "runs" / "tiny", folder / "whole")
    shutil.rmtree(folder / "runs" / "tiny" / "checkpoints" / "12")
    return folder / "runs"


@pytest.fixture
def begun(tiny: Tiny, stopped: Path) -> Tiny:
    """The tiny config beside a run of it that waits to go on."""
    shutil.copytree(stopped, tiny.runs)
    return tiny
