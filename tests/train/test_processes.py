"""A run of several real processes: it gives the numbers of one process, and its processes start and end together."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxinfra.errors import ConfigError, PeerLostError, Preempted
from jaxinfra.track.jsonl import read_metrics
from tests.refusals import names
from tests.several import all_ended, free_address, several
from tests.tiny_run import Tiny, ended, start, summary

MESH = ("mesh.replica=2", "mesh.fsdp=2")


def losses(tiny: Tiny, name: str) -> dict[int, float]:
    return {
        int(row["step"]): row["loss"] for row in read_metrics(tiny.directory(name) / "metrics.jsonl") if "loss" in row
    }


def assert_close(tiny: Tiny, one: str, other: str) -> None:
    ours, theirs = losses(tiny, one), losses(tiny, other)
    assert list(ours) == list(theirs)
    np.testing.assert_allclose([*ours.values()], [*theirs.values()], rtol=1e-6)


def wait_for_step(tiny: Tiny, name: str, step: int, children: list[subprocess.Popen]) -> None:
    metrics = tiny.directory(name) / "metrics.jsonl"
    deadline_s = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"loss"') >= step):
        assert all(child.poll() is None for child in children), [child.communicate() for child in children]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.mark.slow(40)
def test_processes_train_as_one_and_go_on_as_another_number(tiny: Tiny) -> None:
    run = (*MESH, "train.steps=150", "train.eval_every=50")
    one = ended(tiny.start(*run, "name=one", devices=4))
    assert one.code == 0, one
    for count in 2, 4, 1:
        with several(str(tiny.config), *run, "name=several", count=count, devices=4 // count) as children:
            if count > 1:
                wait_for_step(tiny, "several", 8 if count == 2 else 60, children)
                children[-1].send_signal(signal.SIGTERM)
            ends = all_ended(children)
        assert [each.code for each in ends] == [Preempted.exit_code if count > 1 else 0] * count, ends
        assert all("step" not in each.out for each in ends[1:]), "process 0 alone reports"
    assert_close(tiny, "several", "one")


@pytest.mark.parametrize("index", [0, 1])
def test_a_signal_to_one_stops_all_after_the_same_step(tiny: Tiny, index: int) -> None:
    with several(str(tiny.config), *MESH, "name=long", "train.steps=100000") as children:
        wait_for_step(tiny, "long", 3, children)
        children[index].send_signal(signal.SIGTERM)
        stopped = all_ended(children)
    assert [each.code for each in stopped] == [Preempted.exit_code] * 2, stopped
    steps = summary(tiny.directory("long"))["steps"]
    for each in stopped:
        names(each.err.splitlines()[-1], f"after step {steps}")
    assert (tiny.directory("long") / f"checkpoints/{steps}").is_dir()


@pytest.mark.slow(15)
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_loss_of_one_ends_the_others(tiny: Tiny, index: int, number: signal.Signals) -> None:
    with several(str(tiny.config), *MESH, "name=long", "train.steps=100000") as children:
        wait_for_step(tiny, "long", 3, children)
        children[index].send_signal(number)
        survivor = ended(children[1 - index])
        assert survivor.code == PeerLostError.exit_code, survivor
        cause = "killed" if number == signal.SIGKILL else "silent"
        (line,) = (line for line in survivor.err.splitlines() if line.startswith("error: "))
        names(line, f"process {index} {cause}")
        children[index].send_signal(signal.SIGCONT)
        assert ended(children[index]).code == (-signal.SIGKILL if number == signal.SIGKILL else PeerLostError.exit_code)


@pytest.mark.parametrize("override", ["optim.peak_lr=1e-3", "train.eval_every=7"])
def test_processes_that_differ_are_named(tiny: Tiny, override: str) -> None:
    address = free_address()
    where = ("--coordinator", address, "--of", "2", "--devices", "cpu:2", "--process-id")
    first = start(str(tiny.config), *MESH, "name=other", *where, "0")
    second = start(str(tiny.config), *MESH, "name=other", override, *where, "1")
    for each in ended(first), ended(second):
        assert each.code == ConfigError.exit_code
        names(each.err.splitlines()[-1], f"error: process 1 {override.partition('=')[0]}")
    assert not tiny.runs.exists()


SCRIPT = """
import sys
import time
import jaxinfra

jaxinfra.join()
overrides = ["name=script", "train.steps=3", "optim.schedule.warmup_steps=1"]
trainer = jaxinfra.Trainer(jaxinfra.load(sys.argv[1], overrides))
if sys.argv[2] == "fail" and trainer.train()["steps"] == 3:
    raise ValueError("a mistake")
if jaxinfra.join().index == 0:
    time.sleep(12)  # longer than the silence after which a process counts as lost
print(trainer.train()["steps"], trainer.program.mesh.size)
"""


@pytest.mark.slow(20)
def test_a_script_joins(tiny: Tiny) -> None:
    """All processes get the summary from `train`; the error of one ends all of them."""
    for mode, code in ("train", 0), ("fail", 1):
        host, _, port = free_address().rpartition(":")
        where = {"JAX_COORDINATOR_ADDRESS": f"{host}:{port}", "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
        children = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(tiny.config), mode if index else "train"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **where, "JAX_PROCESS_ID": str(index)},
            )
            for index in range(2)
        ]
        first, second = all_ended(children)
        assert (first.code, second.code) == (code, code), (first, second)
        if mode == "train":
            assert first.out.endswith("3 2\n") and second.out.endswith("3 2\n"), (first, second)
        else:
            assert "ValueError: a mistake" in second.err
