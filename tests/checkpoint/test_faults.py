"""After a storage failure or a killed process, the error is one line, and older checkpoints are intact."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfra.checkpoint.config import CheckpointConfig
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.errors import StorageError
from tests.refusals import names, raises

from .child import random_state
from .states import make_mesh, make_state

ROOT = Path(__file__).parents[2]


def run_child(scene: str, directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "tests.checkpoint.child", scene, str(directory)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def result_of(child: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert child.returncode == 0, child.stderr
    assert child.stderr == ""
    return json.loads(child.stdout)


def test_full_disk_is_reported_once_per_save_and_the_next_save_tries_again(tmp_path):
    directory = tmp_path / "run"
    result = result_of(run_child("no_space", directory))
    assert len(result["failures"]) == 2
    for step, failure in zip((30, 40), result["failures"], strict=True):
        names(failure, f"{directory}/{step}: File too large; 10, 20;")
    assert result["intact"] == [10, 20]
    assert set(result["left"]) <= {"10", "20", "40.orbax-checkpoint-tmp"}
    assert result["after"] == [20, 50]
    assert sorted(path.name for path in directory.iterdir()) == ["20", "50"]


def test_host_memory_does_not_grow(tmp_path):
    result = result_of(run_child("memory", tmp_path))
    settled = result["resident_bytes"][20:]
    slope_bytes = np.polyfit(range(len(settled)), settled, 1)[0]
    # Not 0: converting a TensorStore spec to JSON leaks some hundred bytes, 20 to 100 kB per save.
    assert slope_bytes < 0.05 * result["state_bytes"], f"{slope_bytes / 1e3:.0f} kB more for every save"


def test_directory_that_disappears(tmp_path):
    directory = tmp_path / "run"
    state = make_state(make_mesh())
    checkpoints = CheckpointManager(directory, CheckpointConfig(save_every=1))
    checkpoints.save(1, state, {})
    checkpoints.wait_until_finished()
    directory.rename(tmp_path / "away")
    directory.touch()
    with raises(StorageError, "run/2: Not a directory; none"):
        checkpoints.save(2, state, {})
        checkpoints.wait_until_finished()
    directory.unlink()
    (tmp_path / "away").rename(directory)
    assert checkpoints.save(2, state, {})
    checkpoints.close()
    assert checkpoints.all_steps() == [1, 2]


def test_failed_save_is_a_note_of_the_error_that_ended_the_run(tmp_path):
    result = result_of(run_child("ended", tmp_path))
    assert result["error"] == "'the cause'"
    (note,) = result["notes"]
    names(note, f"{tmp_path}/1: File too large; none;")


def test_unwritable_directory_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "run", "/proc/jaxinfra"):
        with raises(StorageError, str(directory)):
            CheckpointManager(directory)


def test_needed_bytes_subtract_existing_checkpoints(tmp_path):
    state = {"params": {"w": np.zeros((256, 1024), np.float32)}}
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1, keep_last=2)) as checkpoints:
        assert checkpoints.needed_bytes(state) == 3 * 2**20
        for step in (1, 2, 3):
            checkpoints.save(step, random_state(step, 256), {})
        checkpoints.wait_until_finished()
        assert checkpoints.needed_bytes(state) == 2**20


def test_old_step_that_cannot_be_deleted(tmp_path, monkeypatch):
    def refuse(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    state = make_state(make_mesh())
    with CheckpointManager(tmp_path, CheckpointConfig(save_every=1, keep_last=1)) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait_until_finished()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", refuse)
            checkpoints.save(2, state, {})
            with raises(StorageError, "2: deleting older steps Permission denied; 2"):
                checkpoints.wait_until_finished()
        checkpoints.save(3, state, {})
        checkpoints.wait_until_finished()
        assert checkpoints.all_steps() == [3]
