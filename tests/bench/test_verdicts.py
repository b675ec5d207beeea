import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import verdicts
from tests.bench.test_slices import refusal
from tests.refusals import refused
from tests.tiny_run import launch


@pytest.mark.slow(40)
def test_a_slow_link_is_named(repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hosts train with late packets between them, after a run without, which is the plan."""
    if reason := refusal():
        pytest.skip(reason)
    monkeypatch.chdir(repo_root)
    monkeypatch.setattr(verdicts, "STEPS", 30)
    # Late enough for a second a step, so that other work on this machine does not hide it.
    monkeypatch.setitem(verdicts.WAYS, "link", replace(verdicts.WAYS["link"], link_delay_s=0.02))
    ended = launch("bench", "verdicts", "--only", "link", "--pairs", "1", "--json", str(tmp_path / "out.json"))
    assert ended.code == 0, ended
    found = json.loads((tmp_path / "out.json").read_text())
    (row,) = found["rows"]
    assert (row["named"], row["of"]) == (1, 1), found
    assert "or the links between processes" in ended.out and "/runs/" not in ended.out


def test_without_strace_files_are_not_slowed_down(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repo_root)
    monkeypatch.setenv("PATH", "/nonexistent")
    refused(launch("bench", "verdicts", "--only", "write"), "strace --only link")
