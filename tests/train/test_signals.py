"""Signals that come at the start, while a batch does not come, and during the last save, to real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxinfra.errors import NonFiniteError, Preempted
from tests.conftest import ROOT
from tests.refusals import names, preempted
from tests.several import free_address
from tests.tiny_run import Tiny, ended, summary
from tests.train.until import until

SCRIPT = """\
import sys, time
from pathlib import Path
from jaxinfra.cli.entry import main
from jaxinfra.checkpoint.manager import CheckpointManager
from jaxinfra.data.batches import BatchLoader

place, step, folder = sys.argv.pop(1), int(sys.argv.pop(1)), Path(sys.argv.pop(1))

def hang():
    (folder / f"{place}-hangs").touch()
    while not (folder / "go-on").exists():
        time.sleep(0.01)

def read(self, index, read=BatchLoader.__getitem__):
    if place != "saving" and self._sample_ids is not None and self._start_step + index >= step:
        hang()
    return read(self, index)

def wait(self, wait=CheckpointManager.wait_until_finished):
    if place == "saving" and self._saving_step is not None and self._saving_step > step:
        hang()
    wait(self)

BatchLoader.__getitem__, CheckpointManager.wait_until_finished = read, wait
sys.exit(main())
"""
"""A run that hangs while it reads a batch after so many steps, or while it saves a later step."""
type Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny: Tiny, tmp_path: Path) -> Iterator[Start]:
    """Starts a process of the tiny run that hangs somewhere."""
    started = []

    def start(place: str, step: int, *arguments: str) -> subprocess.Popen[str]:
        words = [place, str(step), str(tmp_path), str(tiny.config), "train.eval_every=none", "name=tiny", *arguments]
        pipe, env = subprocess.PIPE, {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}
        command = [sys.executable, "-c", SCRIPT, *words]
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=env))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


def saved(tiny: Tiny) -> list[int]:
    return sorted(int(path.name) for path in (tiny.directory() / "checkpoints").glob("*") if path.name.isdecimal())


def has_step(tiny: Tiny, step: int) -> bool:
    metrics = tiny.directory() / "metrics.jsonl"
    return metrics.exists() and f'"step": {step},' in metrics.read_text()


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


def is_told_at(tiny: Tiny, moments_s: list[float]) -> None:
    """Sends signals at moments after the handlers are there, which is before JAX is imported."""
    for number, moment_s in enumerate(moments_s):
        told = (signal.SIGTERM, signal.SIGINT)[number % 2]
        child = tiny.start("name=told", "train.steps=100000", "train.eval_every=none", "checkpoint.save_every=100000")
        until(lambda child=child: handles(child.pid, signal.SIGTERM), child)
        assert "jaxlib" not in Path(f"/proc/{child.pid}/maps").read_text()
        time.sleep(moment_s)
        child.send_signal(told)
        end = ended(child)
        assert end.code == Preempted.exit_code, (moment_s, told, end)
        names(end.err.removesuffix("\n"), "stopped by", told.name)


def test_a_signal_at_the_start(tiny: Tiny) -> None:
    is_told_at(tiny, [0.0, 0.1, 0.5, 1.2])


@pytest.mark.slow(20)
def test_a_signal_at_any_moment_of_the_start(tiny: Tiny) -> None:
    is_told_at(tiny, [0.25, 0.75, 1.0, 1.5, 2.0, 2.75])


def test_a_signal_after_the_first_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while that step is logged, before the save of it: the step is not lost."""
    monkeypatch.setenv("JAXINFRA_FAIL", "log:0:1:term")
    words = ("name=tiny", "track.console=off", "checkpoint.save_every=1")
    preempted(tiny.launch(*words), "SIGTERM after step 1 of 12, saved")
    assert saved(tiny) == [1]


def test_a_batch_that_never_comes_delays_no_request(tiny: Tiny, start: Start, tmp_path: Path) -> None:
    """SIGUSR1 saves and goes on to wait; SIGTERM saves and leaves, although Python would wait for the read."""
    child = start("reading", 7)
    until(lambda: has_step(tiny, 7) and (tmp_path / "reading-hangs").exists(), child)
    assert 7 not in saved(tiny)
    child.send_signal(signal.SIGUSR1)
    until(lambda: 7 in saved(tiny), child)
    child.send_signal(signal.SIGTERM)
    end = ended(child)
    line, hangs = end.err.splitlines()
    assert end.code == Preempted.exit_code
    names(line, "SIGTERM after step 7 of 12, saved")
    names(hangs, "exit code 75 without waiting for grain-prefetch in hang (")


@pytest.mark.slow(10)
def test_a_second_interrupt_gives_up_the_last_save(tiny: Tiny, start: Start, tmp_path: Path) -> None:
    """A second SIGTERM does not: it may come with a first one to the whole process group."""
    child = start("saving", 5, "train.steps=100000")
    until(lambda: has_step(tiny, 7), child)
    child.send_signal(signal.SIGTERM)
    until((tmp_path / "saving-hangs").exists, child)
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    end = ended(child)
    assert (end.code, end.err) == (130, "error: interrupted\n"), end
    assert 5 in saved(tiny)
    (tmp_path / "go-on").touch()
    again = start("nowhere", 10**6, "train.steps=100000")
    until(lambda: 10 in saved(tiny), again)
    again.send_signal(signal.SIGTERM)
    again.send_signal(signal.SIGTERM)
    preempted(ended(again), "SIGTERM after saved")


@pytest.mark.slow(20)
def test_two_processes_save_the_same_step_while_a_batch_is_late(tiny: Tiny, start: Start, tmp_path: Path) -> None:
    """Process 0 has begun a step whose batch process 1 waits for: both save that one, or one that follows at once."""
    several = ("mesh.fsdp=2", "checkpoint.save_every=100", "train.steps=100", "--coordinator", free_address())
    first = start("nowhere", 10**6, *several, "--of", "2", "--process-id", "0")
    second = start("reading", 7, *several, "--of", "2", "--process-id", "1")
    until(lambda: has_step(tiny, 6) and (tmp_path / "reading-hangs").exists(), first)
    time.sleep(1.0)  # process 0 begins the next step
    second.send_signal(signal.SIGUSR1)
    time.sleep(1.0)
    first.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert saved(tiny) == [] and first.poll() is None and second.poll() is None
    (tmp_path / "go-on").touch()
    for end in (ended(first), ended(second)):  # one may also warn that it has waited for data
        assert end.code == Preempted.exit_code, end
        line = names(end.err.splitlines()[-1], "SIGTERM to process 0 after step of 100, saved")
    assert [f"after step {step} of" in line for step in saved(tiny)] == [True] and saved(tiny)[0] in (8, 9)


@pytest.mark.slow(12)
def test_a_request_in_the_last_evaluation_stops_it(tiny: Tiny) -> None:
    """The run leaves without its result, and the next start only evaluates."""
    words = ("track.console=off",)
    assert ended(tiny.start("name=plain", *words)).code == 0
    fail = "evaluation:0:12:term,evaluation:0:12:sleep=1"
    stopped = ended(tiny.start("name=tiny", *words, env={"JAXINFRA_FAIL": fail}))
    preempted(stopped, "SIGTERM step 12")
    assert tiny.evaluations().keys() == {5, 10} and saved(tiny)[-1] == 12
    again = ended(tiny.start("name=tiny", *words))
    assert again.code == 0, again
    assert tiny.evaluations() == tiny.evaluations("plain") and tiny.losses() == tiny.losses("plain")
    assert summary(tiny.directory())["validation"] == summary(tiny.directory("plain"))["validation"]
    assert "nothing to do" in tiny.launch("name=tiny", *words).out


def test_fewer_steps_after_an_evaluation_that_was_stopped(tiny: Tiny) -> None:
    """The evaluation belongs to the config of that start; the run is finished by the new one."""
    stop_evaluation(tiny, 10)
    again = tiny.launch("name=tiny", "train.steps=8", "--accept-change", "track.console=off")
    assert again.code == 0 and "nothing to do" in again.out, again


def test_a_validation_loss_that_is_not_finite_after_the_save(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of that step exists already: the run does not go back to it."""
    stop_evaluation(tiny, 10)
    monkeypatch.setattr("jaxinfra.objectives.causal_lm.CausalLM.evaluation_metrics", lambda *_: {"loss": float("nan")})
    ended = tiny.launch("name=tiny", "track.console=off")
    assert ended.code == NonFiniteError.exit_code, ended
    names(ended.err.splitlines()[-1], f"step 10 validation nan {tiny.directory()}/checkpoints/10")


def stop_evaluation(tiny: Tiny, step: int) -> None:
    """Trains until a signal comes in the evaluation after a step."""
    fail = f"evaluation:0:{step}:term,evaluation:0:{step}:sleep=1"
    child = tiny.start("name=tiny", "track.console=off", devices=8, env={"JAXINFRA_FAIL": fail})
    preempted(ended(child), f"SIGTERM step {step}")
