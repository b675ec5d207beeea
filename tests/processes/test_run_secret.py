"""Processes that are started one by one find one secret; nobody else on the machine reads it."""

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.errors import ConfigError, StorageError
from jaxinfra.processes.discovery import Processes
from jaxinfra.processes.door import SECRET
from jaxinfra.processes.run_secret import FILE, run_secret
from tests.refusals import raises
from tests.servers.bucket import emulated_bucket
from tests.tiny_run import Tiny
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data


def test_all_processes_find_one(tmp_path: Path) -> None:
    places = [str(tmp_path / "runs" / "one")] * 8
    with ThreadPoolExecutor(8) as processes:
        (secret,) = {*processes.map(run_secret, places)}
    path = Path(places[0], FILE)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and os.listdir(path.parent) == [FILE]
    assert run_secret(places[0]) == secret != run_secret(str(tmp_path / "runs" / "another")) and len(secret) == 64


def test_all_processes_find_one_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_bucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        with ThreadPoolExecutor(4) as processes:
            (secret,) = {*processes.map(run_secret, [f"{bucket.url}/one"] * 4)}
        assert run_secret(f"{bucket.url}/one") == secret


def test_a_damaged_one_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"")
    with raises(ConfigError, f"{tmp_path / FILE} delete {SECRET}"):
        run_secret(str(tmp_path))
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(StorageError, match=f"{FILE}: .*{SECRET}"):  # such as a run that is another user's
        run_secret(str(tmp_path))


def test_a_process_takes_that_of_its_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line finds the run before it joins; what the environment says comes first."""
    found = list[Any]()

    @contextmanager
    def join(processes: Processes, *, secret: str | None, **options: Any) -> Any:
        found.append(secret)
        raise ConfigError("joined")
        yield

    monkeypatch.setattr("jaxinfra.cli.main.join", join)
    several: Sequence[str] = ("--coordinator", "127.0.0.1:1", "--of", "2", "--process-id", "1")
    tiny.launch("name=mine", *several)
    monkeypatch.delenv(SECRET)
    tiny.launch("name=mine", *several)
    assert found == ["of all tests", run_secret(str(tiny.directory("mine")))]
