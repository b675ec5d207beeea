"""The package of docs/extend.md adds a scheduler and a command; `test_hub.py` reads weights of its family."""

import sys
from pathlib import Path

import pytest

from jaxinfra.cli.arguments import COMMANDS
from jaxinfra.errors import ConfigError
from jaxinfra.processes.discovery import Processes, find_processes
from tests.plugins import extras as extras
from tests.refusals import raises, refused
from tests.tiny_run import launch

JSRUN = {
    "JSM_NAMESPACE_SIZE": "4",
    "JSM_NAMESPACE_RANK": "2",
    "JSM_NAMESPACE_LOCAL_SIZE": "2",
    "JSM_NAMESPACE_LOCAL_RANK": "0",
    "JAX_COORDINATOR_ADDRESS": "node0:1234",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    "PMI_SIZE": "1",
    "PMI_RANK": "0",
}


@pytest.fixture(autouse=True)
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the command away after a test."""
    monkeypatch.setitem(COMMANDS, "last", COMMANDS["train"])
    monkeypatch.delitem(COMMANDS, "last")


def test_a_command_is_listed_runs_and_fails_on_one_line(extras: Path, tmp_path: Path) -> None:
    assert "print the last metrics of a run" in launch("--help").out
    assert "RUN_DIR" in launch("last", "--help").out
    refused(launch("last", str(tmp_path)), f"{tmp_path}/metrics.jsonl: no such file", code=81)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n')
    ended = launch("last", str(tmp_path))
    assert (ended.code, ended.out) == (0, "{'step': 2, 'loss': 2.25}\n"), ended


def test_a_folder_of_its_name_does_not_hide_a_command(
    extras: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last").mkdir()
    refused(launch("last", "nothing"), "nothing/metrics.jsonl: no such file", code=81)


def test_a_command_that_cannot_be_used_is_named_where_it_is_asked_for(extras: Path) -> None:
    (extras / "extras" / "last.py").write_text("LAST = missing")
    refused(launch("last", "runs/x"), "'last' jaxinfra.commands jaxinfra-extras NameError uninstall", code=81)
    listed = launch("--help")
    assert "train CONFIG" in listed.out and listed.err.startswith("warning: entry point 'last'"), listed.err


def test_without_the_package_the_command_is_unknown() -> None:
    refused(launch("last", "runs/x"), "last: no such command or config", code=81)


def test_a_scheduler_comes_before_those_that_are_here(extras: Path) -> None:
    found = Processes(coordinator="node0:1234", count=4, index=2, local_devices=(0, 1), source="LSF")
    assert find_processes(JSRUN) == found
    local = {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"}  # set by the launcher for processes of its own
    found = find_processes(JSRUN | local)
    assert found is not None and (found.source, found.count) == ("JAX_PROCESS_ID", 3)
    with raises(ConfigError, "LSF: process 4 of 4"):
        find_processes({**JSRUN, "JSM_NAMESPACE_RANK": "4"})


def test_a_package_with_a_mistake_is_named(extras: Path) -> None:
    for content, named in (
        ("LSF = Schedule()", "NameError extras.lsf:LSF uninstall"),
        ("LSF = 3", "extras.lsf:LSF is int; make it a Scheduler"),
    ):
        (extras / "extras" / "lsf.py").write_text(content)
        with raises(ConfigError, f"'lsf' jaxinfra.schedulers jaxinfra-extras {named}"):
            find_processes({})
        sys.modules.pop("extras.lsf", None)
