"""Files and folders of a disk: what is written is whole, and what is wrong is one line."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jaxinfra.errors import StorageError
from jaxinfra.storage import outputs
from jaxinfra.storage.atomic import move_folder, open_atomic, write_bytes_atomic
from jaxinfra.storage.checks import check_space, make_private, make_writable
from tests.refusals import raises

_KILLED = """
import os, signal, sys
from pathlib import Path
from jaxinfra.storage.atomic import open_atomic
with open_atomic(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_bytes_atomic(tmp_path / "file", b"old")
    return tmp_path / "file"


def test_a_replaced_file_may_be_read_by_all(path):
    path.chmod(0o600)
    write_bytes_atomic(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o644)
    assert os.listdir(path.parent) == ["file"]


def test_a_full_disk_changes_nothing_and_leaves_nothing(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), open_atomic(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_a_kill_leaves_the_old_file(path):
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(path)], timeout=600)
    assert ended.returncode < 0 and path.read_bytes() == b"old"


def test_a_folder_is_moved_but_not_over_another(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "file").write_text(name)
    assert move_folder(tmp_path / "one", tmp_path / "new" / "place")
    assert not move_folder(tmp_path / "two", tmp_path / "new" / "place")
    assert (tmp_path / "new" / "place" / "deep" / "file").read_text() == "one"
    assert (tmp_path / "two" / "deep" / "file").read_text() == "two" and not (tmp_path / "one").exists()


def test_too_little_space_is_told_with_both_numbers_and_a_fix(tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    check_space(folder, 1000, purpose="saving", fix="save less")
    check_space("gs://bucket/run", 10**18, purpose="saving", fix="save less")
    with raises(StorageError, f"{folder}: saving 1.0 EB save less"):
        check_space(folder, 10**18, purpose="saving", fix="save less")
    assert not (tmp_path / "not").exists()


def test_a_folder_that_others_may_change_is_not_private(tmp_path):
    make_private(tmp_path / "new" / "own")
    assert (tmp_path / "new" / "own").stat().st_mode & 0o077 == 0
    (tmp_path / "link").symlink_to(tmp_path / "new" / "own")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "sticky").mkdir()
    (tmp_path / "sticky").chmod(0o1777)
    make_private(tmp_path / "sticky" / "own")
    for wrong in ("link", "open", "open/own"):
        with raises(StorageError, f"{tmp_path}/{wrong}: another user"):
            make_private(tmp_path / wrong)


def test_a_folder_that_cannot_be_made_is_an_error_of_the_storage(path):
    with raises(StorageError, f"{path}/below: Not a directory"):
        make_writable(path / "below")


def test_a_file_is_replaced_where_a_link_leads(path):
    link = path.with_name("link")
    link.symlink_to(path)
    outputs.write_text(link, "new")
    assert link.is_symlink() and path.read_text() == outputs.read_text(link) == "new"
    assert sorted(os.listdir(path.parent)) == ["file", "link"]


def test_a_pipe_stays_a_pipe(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    outputs.write_text(pipe, "text")
    reader.join(timeout=600)
    assert read == ["text"] and stat.S_ISFIFO(pipe.stat().st_mode)
