"""A run of several real processes: it gives the numbers of one process, and its processes start and end together."""

import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from jaxinfra.config import read_record
from jaxinfra.errors import ConfigError, HungError, PeerLostError, Preempted
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.track.runs import list_runs
from tests.refusals import names
from tests.several import all_ended, free_address, several
from tests.tiny_run import Tiny, ended, start, summary

RECORDED = """\
import os
import signal
import threading
from dataclasses import dataclass

import numpy as np

from jaxinfra.data.tokens import TokenData
from jaxinfra.runtime.peers import current_peers

local = threading.local()


@dataclass(frozen=True, kw_only=True)
class RecordedTokens(TokenData):
    \"""Appends the samples that this process reads for each step to a file; asks for a stop when it reads STOP_AT.\"""

    def open(self, *, hint: str = ""):
        dataset = super().open(hint=hint)
        sample_ids, read = dataset.sample_ids, dataset.train.read

        def ids_of_step(step: int, global_batch: int) -> np.ndarray:
            local.step = step
            if os.environ.get("STOP_AT") == str(step) and current_peers().index == current_peers().count - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return sample_ids(step, global_batch)

        def recorded_read(ids: np.ndarray, *, weighted: bool):
            with open(f"{os.environ['READS']}-{current_peers().index}", "a") as file:
                print(local.step, *ids, file=file)
            return read(ids, weighted=weighted)

        dataset.sample_ids, dataset.train.read = ids_of_step, recorded_read
        return dataset
"""

MESH = ("mesh.replica=2", "mesh.fsdp=2")


def recording(tiny: Tiny) -> Path:
    """A copy of the config whose processes write down what they read."""
    path = tiny.edited("data=TokenData(", "data=RecordedTokens(")
    path.write_text(RECORDED + path.read_text())
    return path


def samples_by_step(reads: Path) -> dict[int, list[int]]:
    """The samples that all processes have read for each step, in the order of the processes' rows."""
    found: dict[int, list[int]] = {}
    for path in sorted(reads.parent.glob(f"{reads.name}-*")):
        for line in path.read_text().splitlines():
            step, *ids = map(int, line.split())
            found.setdefault(step, []).extend(ids)
    return dict(sorted(found.items()))


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
def test_processes_train_as_one_and_go_on_as_another_number(tiny: Tiny, tmp_path: Path) -> None:
    """Started by one process, going on with four, then with two: the samples of each step and the losses stay."""
    config, run = recording(tiny), (*MESH, "train.steps=60", "train.eval_every=20")
    reads = tmp_path / "one"
    one = ended(start(str(config), *run, "name=one", "--devices", "cpu:4", env={"READS": str(reads)}))
    assert one.code == 0, one
    expected, last_step = samples_by_step(reads), 0
    assert [*expected] == [*range(60)]
    for count, stop in (1, 20), (4, 40), (2, None):
        reads = tmp_path / str(count)
        env = {"READS": str(reads)} | ({} if stop is None else {"STOP_AT": str(stop)})
        with several(str(config), *run, "name=several", count=count, devices=4 // count, env=env) as children:
            ends = all_ended(children)
        assert [each.code for each in ends] == [0 if stop is None else Preempted.exit_code] * count, ends
        assert all("step" not in each.out for each in ends[1:]), "process 0 alone reports"
        found, first_step = samples_by_step(reads), last_step
        last_step = summary(tiny.directory("several"))["steps"]
        assert first_step < last_step <= (stop or 60)
        # Batches are read ahead of the last step, so the next start reads them again.
        assert {*range(first_step, last_step)} <= found.keys()
        assert all(ids == expected[step] for step, ids in found.items())
    assert last_step == 60
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
        code = PeerLostError.exit_code if number == signal.SIGKILL else HungError.exit_code
        assert survivor.code == code, survivor
        cause = "killed" if number == signal.SIGKILL else "silent at step stacks/"
        (line,) = (line for line in survivor.err.splitlines() if line.startswith("error: "))
        names(line, f"process {index} {cause}")
        if number == signal.SIGKILL:
            (overview,) = list_runs(tiny.runs)
            assert overview.state == "interrupted"
        else:
            (stacks,) = (tiny.directory("long") / "stacks").iterdir()
            assert stacks.name.endswith(f"-rank-{1 - index}.txt") and "MainThread" in stacks.read_text()
        children[index].send_signal(signal.SIGCONT)
        assert ended(children[index]).code == (-signal.SIGKILL if number == signal.SIGKILL else code)


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


@pytest.mark.slow(30)
def test_clocks_may_differ(tiny: Tiny) -> None:
    """The clock of one host is an hour late: no process compares its own with that of another."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    late = {"LD_PRELOAD": str(library), "FAKETIME": "-1h", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    for name, envs in ("right", ({}, {})), ("late", (late, {})):
        where = ("--coordinator", free_address(), "--of", "2", "--devices", "cpu:2", "--process-id")
        words = (str(tiny.config), *MESH, f"name={name}", *where)
        children = [start(*words, str(index), env=env) for index, env in enumerate(envs)]
        ends = all_ended(children)
        assert [each.code for each in ends] == [0, 0], ends
    assert tiny.losses("late") == tiny.losses("right")
    started_s = datetime.fromisoformat(read_record(tiny.directory("late") / "run.json")["created"]).timestamp()
    assert started_s < time.time() - 3000, "the clock was late"


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
