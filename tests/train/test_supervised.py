"""`--supervise` in real runs: what a kill costs, what is recorded, and who may train a run."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxinfra.cli import processes
from jaxinfra.errors import PeerLostError, RunInUseError
from jaxinfra.processes import step_file
from jaxinfra.storage.objects import ObjectStore
from tests.refusals import names, raises
from tests.servers.fixtures import Server
from tests.several import all_ended, several
from tests.tiny_run import Tiny, ended, launch
from tests.train.until import until


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def attempts(lines: bytes) -> list[dict]:
    return [json.loads(line) for line in lines.splitlines()]


def has_step(tiny: Tiny, step: int, name: str = "tiny") -> Callable[[], bool]:
    metrics = tiny.directory(name) / "metrics.jsonl"
    return lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()


def test_a_killed_run_goes_on(tiny: Tiny) -> None:
    supervisor = tiny.start("train.steps=100", "train.eval_every=none", "name=tiny", "--supervise")
    until((tiny.directory() / "checkpoints" / "5").exists, supervisor)
    (child,) = children(supervisor.pid)
    os.kill(child, signal.SIGKILL)
    end = ended(supervisor)
    (line,) = end.err.splitlines()
    assert end.code == 0 and line.startswith("restart 1: process 0 killed by SIGKILL after step ")
    assert end.out.count("new run") == end.out.count("resuming") == 1 and "Training loss" in end.out
    assert list(tiny.losses()) == [*range(1, 101)]
    first, second = attempts((tiny.directory() / "attempts.jsonl").read_bytes())
    assert (first["pids"], first["signal"], first["first_step"]) == ([child], "SIGKILL", 1)
    assert second["exit_code"] == 0 and second["last_step"] == 100
    assert second["first_step"] % 5 == 1 and second["first_step"] <= first["last_step"] + 1


def test_a_start_before_the_first_checkpoint_says_so(tiny: Tiny) -> None:
    words = ("name=tiny", "train.steps=40", "train.eval_every=none", "checkpoint.save_every=1000")
    supervisor = tiny.start(*words, "--supervise")
    until(has_step(tiny, 3), supervisor)
    (child,) = children(supervisor.pid)
    os.kill(child, signal.SIGKILL)
    end = ended(supervisor)
    assert end.code == 0 and "restart 1: " in end.err, end.err
    lines = [line for line in end.out.splitlines() if line.startswith(("new run", "resuming"))]
    assert lines[0].startswith(f"new run {tiny.directory()}: ")
    assert lines[1:] == [f"resuming {tiny.directory()} at step 0 of 40, as it has no checkpoint yet"]


def test_why_a_run_left_is_a_sentence(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves after a checkpoint, so that more hosts can join."""
    steps = tmp_path / "steps"
    step_file.reset_steps(steps)
    step_file.leave_file(steps).touch()
    monkeypatch.setenv(step_file.VARIABLE, str(steps))
    monkeypatch.setenv(step_file.ROUND, "1")
    left = tiny.launch("name=left")
    assert left.code == 75 and "stopped by its supervisor (more hosts are there) after step 5 of 12, saved" in left.err
    told = launch("goodput", str(tiny.directory("left"))).out
    assert "\none start stopped after step 5 by its supervisor (more hosts are there)\n" in told


@pytest.mark.parametrize("kills", [2, 3])
def test_a_helper_of_the_supervisor_that_is_killed_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kills: int
) -> None:
    """It finds the directory of the run; a script in place of Python counts its starts."""
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
echo start >> {tmp_path}/starts
[ $(wc -l < {tmp_path}/starts) -gt {kills} ] || kill -9 $$
echo '{{"location": "runs/tiny"}}'
""")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    if kills == 2:
        assert processes.ask_location([]) == "runs/tiny"
    else:
        with raises(PeerLostError, "killed by SIGKILL"):
            processes.ask_location([])
    for line in capsys.readouterr().err.splitlines():
        names(line, "warning: the run's directory killed by SIGKILL again")


@pytest.mark.slow(20)
def test_a_run_in_a_bucket(s3: Server, tiny: Tiny) -> None:
    """A dead process's lease is free at once there, too. As long as the process lives, nobody else trains the run."""
    root = s3.new_url().removesuffix("/store")
    words = (f"root={root}", "name=tiny", "train.steps=60", "train.eval_every=none", "checkpoint.save_every=2")
    supervisor = tiny.start(*words, "--supervise")
    store = ObjectStore(f"{root}/tiny")
    until(lambda: any(name.startswith("checkpoints/4.") for name in store.list_names()), supervisor)
    (child,) = children(supervisor.pid)
    supervisor.send_signal(signal.SIGQUIT)
    until(lambda: any(name.startswith("stacks/") for name in store.list_names()), supervisor)
    os.kill(child, signal.SIGSTOP)  # it may not end before the second supervisor has looked
    other = ended(tiny.start(*words, "--supervise"))
    assert other.code == RunInUseError.exit_code and f"process {child} " in other.err and "restart" not in other.err
    os.kill(child, signal.SIGKILL)
    end = ended(supervisor)
    assert end.code == 0 and "restart 1: process 0 killed by SIGKILL" in end.err and "waiting" not in end.err, end
    first, second = attempts(store.read("attempts.jsonl"))
    assert first["signal"] == "SIGKILL" and (second["exit_code"], second["last_step"]) == (0, 60)
    ledger = [json.loads(line) for line in store.read("goodput.jsonl").splitlines()]
    assert {row["attempt"] for row in ledger} == {1, 2} and ledger[-1]["step"] == 60
    assert second["first_step"] > 1 and first["log"].startswith(f"{root}/tiny/logs/")


@pytest.mark.slow(20)
def test_hosts_that_supervise_meet_again(tiny: Tiny) -> None:
    """Each host supervises its own process; the supervisor of process 0 records the attempts."""
    words = ("train.steps=60", "mesh.fsdp=2", "train.eval_every=none", "checkpoint.save_every=5", "name=tiny")
    with several(str(tiny.config), *words, "--supervise", devices=1) as hosts:
        until(has_step(tiny, 12), hosts[0])
        os.kill(children(hosts[1].pid)[0], signal.SIGKILL)
        ends = all_ended(hosts)
    assert [each.code for each in ends] == [0, 0], ends
    assert "restart 1: exit code 76 (another process lost) after step " in ends[0].err
    assert "restart 1: process 1 killed by SIGKILL after step " in ends[1].err
    first, second = attempts((tiny.directory() / "attempts.jsonl").read_bytes())
    assert (first["exit_code"], second["exit_code"], second["last_step"]) == (76, 0, 60)
    assert {path.name for path in (tiny.directory() / "logs").iterdir()} == {"rank-0.log", "rank-1.log"}
