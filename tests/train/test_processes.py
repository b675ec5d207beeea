"""A run of several real processes: it gives the numbers of one process, and its processes start and end together."""

import os
import signal
import subprocess
import sys

import pytest

from jaxinfra.errors import ConfigError, HungError, Preempted
from tests.refusals import names
from tests.several import all_ended, free_address, several
from tests.tiny_run import Tiny, ended, start
from tests.train.until import until

MESH = ("mesh.replica=2", "mesh.fsdp=2")


@pytest.mark.slow(15)
def test_the_others_say_that_the_first_process_is_silent(tiny: Tiny) -> None:
    metrics = tiny.directory("long") / "metrics.jsonl"
    with several(str(tiny.config), *MESH, "name=long", "train.steps=100000") as children:
        until(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, *children)
        children[0].send_signal(signal.SIGSTOP)
        survivor = ended(children[1])
        assert survivor.code == HungError.exit_code, survivor
        (line,) = (line for line in survivor.err.splitlines() if line.startswith("error: "))
        names(line, "process 0 silent at step stacks/")
        (stacks,) = (tiny.directory("long") / "stacks").iterdir()
        assert stacks.name.endswith("-rank-1.txt") and "MainThread" in stacks.read_text()
        children[0].send_signal(signal.SIGCONT)
        assert ended(children[0]).code == HungError.exit_code


@pytest.mark.slow(25)
def test_all_leave_an_evaluation_together(tiny: Tiny) -> None:
    """A request to one of them stops the evaluation of all, and the next start begins with it."""
    words = (str(tiny.config), *MESH, "track.console=off")
    with several(*words, "name=plain") as children:
        assert [each.code for each in all_ended(children)] == [0, 0]
    with several(*words, env={"JAXINFRA_FAIL": "evaluation:1:5:term,evaluation:*:5:sleep=2"}) as children:
        ends = all_ended(children)
    assert [each.code for each in ends] == [Preempted.exit_code] * 2, ends
    names(ends[0].err.removesuffix("\n"), "SIGTERM to process 1 after step 5")
    assert tiny.evaluations() == {}
    with several(*words) as children:
        assert [each.code for each in all_ended(children)] == [0, 0]
    assert tiny.evaluations() == tiny.evaluations("plain") and len(tiny.evaluations()) == 3
    assert tiny.losses() == tiny.losses("plain")


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
if sys.argv[2] == "stop":
    print("trained", flush=True)
    time.sleep(1000)
"""


@pytest.mark.slow(20)
def test_a_script_joins(tiny: Tiny) -> None:
    """All processes get the summary from `train`; an error of one, or a signal after the training, ends all."""
    for mode, code in ("train", 0), ("fail", 1), ("stop", Preempted.exit_code):
        host, _, port = free_address().rpartition(":")
        where = {"JAX_COORDINATOR_ADDRESS": f"{host}:{port}", "JAX_NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
        children = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(tiny.config), mode if index or mode == "stop" else "train"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **where, "JAX_PROCESS_ID": str(index)},
            )
            for index in range(2)
        ]
        if mode == "stop":
            for child in children:
                assert child.stdout and "trained\n" in iter(child.stdout.readline, "")
            children[1].send_signal(signal.SIGTERM)
        first, second = all_ended(children)
        assert (first.code, second.code) == (code, code), (first, second)
        if mode == "train":
            assert first.out.endswith("3 2\n") and second.out.endswith("3 2\n"), (first, second)
        elif mode == "fail":
            assert "ValueError: a mistake" in second.err
