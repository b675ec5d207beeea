"""attempts.jsonl gets every attempt, also those that storage has refused for a while."""

import json
from pathlib import Path

import pytest

from jaxinfra.storage.objects import ObjectStore
from jaxinfra.track.attempts import AttemptLog
from tests.servers.fixtures import Server


def test_on_a_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, run = AttemptLog(str(tmp_path / "run")), tmp_path / "run"
    log.append({"attempt": 1})
    assert str(run) in caplog.text
    run.mkdir()
    log.append({"attempt": 2})
    AttemptLog(str(run)).append({"attempt": 1})
    assert [json.loads(line)["attempt"] for line in (run / "attempts.jsonl").read_text().splitlines()] == [1, 2, 1]


def test_in_a_bucket(gcs: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")
    url = gcs.new_url()
    log = AttemptLog(url)
    gcs.faults.down = True
    log.append({"attempt": 1})
    gcs.faults.down = False
    log.append({"attempt": 2})
    assert ObjectStore(url).read("attempts.jsonl") == b'{"attempt": 1}\n{"attempt": 2}\n'
