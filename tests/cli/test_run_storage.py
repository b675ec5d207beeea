"""Storage that fails while a run is going: it costs a checkpoint, and the run only where nothing can be saved."""

import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.checkpoint.disk_saver import DiskSaver
from jaxinfra.cli import models
from jaxinfra.errors import NonFiniteError, StorageError
from jaxinfra.storage.closing import ClosedOnExit
from tests.refusals import names, refused
from tests.tiny_run import STEPS, Tiny, launch


@pytest.fixture
def full_at(monkeypatch: pytest.MonkeyPatch):
    """Lets the disk be full when certain steps are saved; returns the steps that were tried."""

    def at(*steps: int) -> list[int]:
        def save(self: DiskSaver, step: int, *arguments: Any) -> None:
            tried.append(step)
            if step in steps:
                raise OSError(errno.ENOSPC, "No space left on device")
            plain(self, step, *arguments)

        monkeypatch.setattr(DiskSaver, "save", save)
        return tried

    tried: list[int] = []
    plain = DiskSaver.save
    return at


def saved(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdecimal())


def test_one_save_fails(tiny: Tiny, full_at, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, says so in one line, and saves the next time."""
    tried = full_at(5)
    with caplog.at_level(logging.ERROR):
        ended = tiny.launch("track.console=off")
    assert (ended.code, tried, saved(tiny.directory())) == (0, [5, 10, STEPS], [10, STEPS])
    (message,) = caplog.messages
    names(message, f"{tiny.directory()}/checkpoints/5: No space left next save")


def test_every_save_fails(tiny: Tiny, full_at, caplog: pytest.LogCaptureFixture) -> None:
    """Each is tried once; then the run ends with the error of the last one, and its metrics are whole."""
    tried = full_at(5, 10, STEPS)
    ended = tiny.launch("track.console=off")
    assert "next save" not in refused(ended, f"{tiny.directory()}/checkpoints/{STEPS}: No space left", code=82)
    assert tried == [5, 10, STEPS]
    assert set(tiny.losses()) == set(range(1, STEPS + 1))


def test_a_failure_to_close_is_told_with_the_error_before_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before step 7, which diverges, cannot be completed."""

    class Closing(ClosedOnExit):
        def close(self) -> None:
            raise StorageError("runs/tiny/checkpoints/5: No space left")

    def run(*arguments: object) -> int:
        with Closing():
            raise NonFiniteError("step 7: loss is nan")

    monkeypatch.setattr(models, "run", run)
    refused(launch("models"), "step 7: loss is nan; runs/tiny/checkpoints/5: No space left", code=80)


def test_goes_on_from_the_last_good_one(tiny: Tiny, full_at, monkeypatch: pytest.MonkeyPatch) -> None:
    full_at(10, STEPS)
    assert tiny.launch("track.console=off").code == 82
    assert saved(tiny.directory()) == [5]
    first = tiny.losses()
    monkeypatch.undo()
    assert tiny.launch("track.console=off").code == 0
    assert saved(tiny.directory()) == [10, STEPS]
    assert tiny.losses() == first
