"""What commands write is whole, and takes the place of files alone."""

import os
import stat
import threading
from pathlib import Path

from jaxinfra.errors import StorageError
from jaxinfra.storage import outputs
from tests.refusals import raises


def test_a_file_is_replaced_where_a_link_leads(tmp_path: Path) -> None:
    there, link = tmp_path / "there", tmp_path / "link"
    there.write_text("old")
    link.symlink_to(there)
    outputs.write(link, "new")
    assert link.is_symlink() and there.read_text() == outputs.read(link) == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "there"]


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    outputs.write(pipe, "text")
    reader.join(timeout=10)
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with raises(StorageError, str(tmp_path / "none")):
        outputs.read(tmp_path / "none")
