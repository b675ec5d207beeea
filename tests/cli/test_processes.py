"""`--processes N`: what is refused before anything starts, and what each process is started with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxinfra.cli import processes
from jaxinfra.cli.main import parse_command_line
from jaxinfra.errors import ConfigError, PeerLostError, Preempted
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises, refused
from tests.servers.fixtures import Server
from tests.tiny_run import Tiny, ended, launch


@pytest.mark.parametrize("number", ["0", "-1"])
def test_number_of_processes(tiny: Tiny, number: str) -> None:
    line = refused(tiny.launch("--processes", number), f"--processes {number}")
    assert line.endswith("use --processes 1")
    assert tiny.launch("--processes", "1", "train.steps=1", "optim.schedule.warmup_steps=0").code == 0


def test_more_processes_than_devices(tiny: Tiny) -> None:
    refused(tiny.launch("--processes", "4", "--devices", "cpu:2"), "--devices cpu:2 --processes cpu:4")
    assert not tiny.runs.exists()


@pytest.mark.parametrize("option", ["coordinator", "process_id"])
def test_options_of_one_process(tiny: Tiny, option: str) -> None:
    options = parse_command_line([str(tiny.config), "--processes", "2"])
    setattr(options, option, "1")
    with raises(ConfigError, f"--{option.replace('_', '-')} 1 --processes leave out"):
        processes.run(options)


def test_logs_that_cannot_be_written(tiny: Tiny) -> None:
    tiny.directory().mkdir(parents=True)
    (tiny.directory() / "logs").touch()
    refused(tiny.launch("--processes", "2"), f"{tiny.directory()}/logs", code=82)


def test_wrong_overrides_are_refused_once(tiny: Tiny) -> None:
    refused(tiny.launch("--processes", "2", "train.stepz=1"), "train.stepz train.steps?")
    assert not tiny.runs.exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["x.py", "--processes", "4", "train.steps=3", "--devices", "cpu:8", "--import", "y.py"],
        ["train", "x.py", "--processes=4", "--dev=cpu:8", "train.steps=3", "--debug"],
        ["--processe", "4", "x.py"],
    ],
)
def test_command_of_one_process(argv: list[str]) -> None:
    """The same options, whatever their spelling, but for the devices and the number of processes."""
    command = processes.child_command(argv, "cpu:2")
    program, words = command[:3], command[3:]
    assert program[:2] == [sys.executable, "-c"]
    options = {**vars(parse_command_line(argv)), "processes": 1, "devices": "cpu:2", "argv": words}
    assert vars(parse_command_line(words)) == options


def test_an_error_of_all_processes_is_one_line(tiny: Tiny, tmp_path: Path, repo_root: Path) -> None:
    store = f"data.store={tmp_path / 'elsewhere'}"
    words = [str(tiny.config), store, "--devices", "cpu:2", "name=failed"]
    command = [sys.executable, "-m", "launch", *words, "--processes", "2"]
    pipe = subprocess.PIPE
    end = ended(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=repo_root))
    alone = launch(*words)
    message = alone.err.removeprefix("error: ")
    # A busy machine may keep process 1 so long that JAX aborts it when process 0 has ended, with lines of its own.
    shown = "".join(line for line in end.err.splitlines(keepends=True) if not line.startswith("[1] "))
    assert (end.code, end.out, end.err.count("error: "), shown.count("\n")) == (81, "", 1, 1), end.err
    assert shown.startswith("error: ") and shown.endswith(message)
    for rank in range(2):
        log = (tiny.directory("failed") / "logs" / f"rank-{rank}.log").read_text()
        assert message in log
        assert f"-m launch {' '.join(words[:2])} name=failed --devices cpu:1\n" in log


def test_logs_in_a_bucket(server: Server, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start has its own, also one that is refused or evaluates. The exit code is that of the run."""
    monkeypatch.setenv("JAXINFRA_STORAGE_RETRY_S", "0.2")
    url = server.new_url()
    words = ("--processes", "2", "--devices", "cpu:2", f"root={url}")
    for number, code in enumerate((0, PeerLostError.exit_code, Preempted.exit_code)):

        def launch(command: object, environments: object, logs: Path, number: int = number, code: int = code) -> int:
            (logs / "rank-0.log").write_text(f"start {number}\n")
            server.faults.down = number == 2
            return code

        monkeypatch.setattr(processes, "launch", launch)
        monkeypatch.setattr(os, "getpid", lambda number=number: number)  # the starts are of one process here
        done = tiny.launch(*words)
        assert done.code == code
    names(done.err.removesuffix("\n"), f"warning: {url}/tiny/logs/ rank-0.log")
    server.faults.down = False
    store = ObjectStore(f"{url}/tiny/logs")
    assert [store.read(name) for name in store.list_names()] == [b"start 0\n", b"start 1\n"]
