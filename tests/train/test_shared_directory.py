"""Processes of several hosts check that they see the same run directory; nothing of it stays after a forced exit."""

import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxinfra import run_dir
from jaxinfra.errors import ConfigError, JaxinfraError
from jaxinfra.processes.connected_peers import ConnectedPeers
from jaxinfra.run_dir import RunDirectory
from tests.refusals import names
from tests.several import free_address, one_of


def results(folders: Sequence[Path], monkeypatch: pytest.MonkeyPatch) -> list[JaxinfraError | None]:
    """Returns what the check raises in each process."""
    monkeypatch.setattr(ConnectedPeers, "_end_process", lambda *_: None)
    address = free_address()

    def check(index: int) -> JaxinfraError | None:
        try:
            with ConnectedPeers(one_of(address, len(folders), index), join_s=20.0) as peers:
                RunDirectory(folders[index], peers).require_shared()
        except JaxinfraError as error:
            return error
        return None

    with ThreadPoolExecutor(len(folders)) as threads:
        return [*threads.map(check, range(len(folders)))]


def test_a_lookup_that_remembers_a_missing_file_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, where a process may have looked before the directory was made."""
    monkeypatch.setattr(Path, "exists", lambda path: False)
    folder = tmp_path / "run"
    folder.mkdir()
    assert results([folder, folder], monkeypatch) == [None, None]
    assert not [*folder.iterdir()]


def test_the_owner_sweeps_what_kills_have_left(tmp_path: Path) -> None:
    kept = {"metrics.jsonl", ".metrics.jsonl.tmp", ".gitignore", ".report.html.ab12cd_9.tmp"}
    for name in (*kept, ".metrics.jsonl.ab12cd_9.tmp", ".shared.00004711.tmp"):
        (tmp_path / name).touch()
    with RunDirectory(tmp_path).owned():
        assert {path.name for path in tmp_path.iterdir()} == kept | {"lease"}


def test_a_directory_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_dir, "_SEEN_S", 0.5)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    told, own = results(folders, monkeypatch)
    assert type(told) is type(own) is ConfigError
    names(str(own), f"{folders[1]} process 0 root=FOLDER")
    assert not [*folders[0].iterdir()]


def test_a_forced_exit_removes_the_temporary_folder_of_a_run_in_a_bucket() -> None:
    code = """
from jaxinfra.run_dir import RunDirectory
from jaxinfra.processes.peers import current_peers
directory = RunDirectory("s3://bucket/run")
print(directory.path.parent, flush=True)
current_peers().exit(76)
"""
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert end.returncode == 76, end
    assert not Path(end.stdout.strip()).exists()
