"""A file or a folder is put into place whole or not at all; a long job that has no room for its output never begins."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.errors import StorageError
from jaxinfra.storage.atomic import atomic_file, move_folder, replace_bytes
from jaxinfra.storage.checks import check_space, make_writable

_KILLED = """
import os, signal, sys
from pathlib import Path
from jaxinfra.storage.atomic import atomic_file
with atomic_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    replace_bytes(tmp_path / "file", b"old")
    return tmp_path / "file"


def test_a_replaced_file_may_be_read_by_all(path):
    path.chmod(0o600)
    replace_bytes(path, b"new")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o644)
    assert os.listdir(path.parent) == ["file"]


def test_a_full_disk_changes_nothing_and_leaves_nothing(path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_a_kill_leaves_the_old_file(path):
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(path)], timeout=60)
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
    with pytest.raises(StorageError) as caught:
        check_space(folder, 10**18, purpose="saving", fix="save less")
    for part in (f"{folder}: ", " free, saving needs ", "1.0 EB", "save less"):
        assert part in str(caught.value)
    assert not (tmp_path / "not").exists()


def test_a_folder_that_cannot_be_made_is_an_error_of_the_storage(path):
    with pytest.raises(StorageError, match=f"^{path}/below: .*Not a directory"):
        make_writable(path / "below")
