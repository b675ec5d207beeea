"""Phases of a training: exact sums, a ledger that survives kills, and what a watchdog does when one takes too long."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from jaxinfra.errors import HungError, Preempted
from jaxinfra.processes.config import WatchdogConfig
from jaxinfra.track.goodput import account, read_ledger
from jaxinfra.track.jsonl import read_metrics
from jaxinfra.train.phases import Phases
from jaxinfra.train.watch import deadline_s
from tests.refusals import names
from tests.several import all_ended, several
from tests.tiny_run import Tiny, ended, launch
from tests.train.until import until


def test_phases_sum_to_the_time_whoever_reads() -> None:
    phases, ended, worst_s = Phases(), threading.Event(), 0.0

    def switch() -> None:
        while not ended.is_set():
            with phases("evaluation"), phases.first("f"), phases("data"):
                pass

    thread = threading.Thread(target=switch)
    thread.start()
    for _ in range(20_000):
        before_s = time.monotonic() - phases.start_s
        found_s = sum(phases.seconds().values())
        worst_s = max(worst_s, before_s - found_s, found_s - (time.monotonic() - phases.start_s))
    ended.set()
    thread.join()
    assert worst_s < 1e-6


def test_an_inner_phase_takes_its_time_from_the_outer_one() -> None:
    phases, left = Phases(), list[str]()
    phases.on_leave = left.append
    phases.enter("step")
    with pytest.raises(ValueError, match="late"), phases("save"):
        with phases.first("f"):
            assert phases.current == "compile"
        with phases.first("f"):
            assert phases.current == "save"
        raise ValueError("late")
    assert phases.current == "step" and left == ["init", "compile", "save"]


def test_the_deadline_of_a_step_follows_its_median() -> None:
    phases, config = Phases(), WatchdogConfig(step_s=1.0, step_factor=10.0, compile_s=99.0, data_s=7.0, other_s=None)
    assert deadline_s(config, phases, phases.current) is None
    phases.resume(20)
    phases.enter("step")
    assert deadline_s(config, phases, phases.current) == 99.0, "the first step may compile more"
    for step in range(21, 24):
        time.sleep(0.25)
        phases.finish_step(step)
    assert 2.5 <= (deadline_s(config, phases, phases.current) or 0) < 10
    with phases("data"):
        assert deadline_s(config, phases, phases.current) == 7.0


def wait_for_steps(tiny: Tiny, name: str, least: int, children: list[subprocess.Popen]) -> None:
    metrics = tiny.directory(name) / "metrics.jsonl"
    until(lambda: metrics.exists() and any(row["step"] >= least for row in read_metrics(metrics)), *children)


@pytest.mark.slow(25)
def test_the_classes_sum_to_the_time_of_a_run_that_is_killed(tiny: Tiny, tmp_path: Path) -> None:
    """Killed, asked to stop, and ended: from the first start to the last sign of life, on a clock of ours."""
    folder, started_s, gap_s = tiny.directory(), time.time(), 0.0
    for steps, number, code in (
        (23, signal.SIGKILL, -signal.SIGKILL),
        (30, signal.SIGTERM, Preempted.exit_code),
        (40, 0, 0),
    ):
        child = tiny.start("name=tiny", "train.steps=100", "train.eval_every=50")
        wait_for_steps(tiny, "tiny", steps, [child])
        if number:
            child.send_signal(number)
        assert ended(child).code == code
        if number:
            time.sleep(1.0)
            gap_s += 1.0
    whole_s = max(path.stat().st_mtime for path in folder.rglob("*")) - started_s
    attempts = read_ledger(folder / "goodput.jsonl")
    run = account(attempts)
    assert run.wall_s == pytest.approx(whole_s, rel=0.01)
    first, second, third = attempts
    killed_at, again_from = first.rows[-1].step, second.from_step or 0
    assert first.from_step == 0 and 5 <= again_from < killed_at and (third.from_step or 0) >= 30
    assert {"init", "restore", "compile", "step", "save", "evaluation", "lost", "end"} <= run.seconds.keys()
    assert run.seconds["down"] > gap_s
    said = launch("goodput", str(folder), "--mtbf", "3.1h", "--json", str(tmp_path / "goodput.json"))
    assert said.code == 0, said.err
    assert all(words in said.out for words in ("lost and recomputed", "3 starts", "goodput", "3:06:00")), said.out
    (values,) = json.loads((tmp_path / "goodput.json").read_text()).values()
    assert values["seconds"] == run.seconds and 0 < values["model"]["goodput"] < values["model"]["best_goodput"] < 1
    assert "t-lost" in (folder / "report.html").read_text()


SLOW = """\
import threading
import time
from dataclasses import dataclass

from jaxinfra.data.tokens import TokenData
from jaxinfra.processes.peers import current_peers

one_at_a_time = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class SlowTokens(TokenData):
    \"""Process 1 reads slowly from step 12 on, and hangs at step 75.\"""

    def open(self, *, hint: str = ""):
        dataset = super().open(hint=hint)
        sample_ids = dataset.sample_ids

        def slow(step, global_batch):
            if current_peers().index == 1 and step >= 12:
                with one_at_a_time:  # many threads read
                    time.sleep(0.3 if step < 75 else 1000)
            return sample_ids(step, global_batch)

        dataset.sample_ids = slow
        return dataset


"""


@pytest.mark.slow(20)
def test_a_process_that_is_slow_and_then_hangs_is_named(tiny: Tiny) -> None:
    """It is named while the run goes on; SIGQUIT writes the stacks of both; when it hangs, both end."""
    config = tiny.edited("data=TokenData(", "data=SlowTokens(")
    config.write_text(SLOW + config.read_text())
    words = ("mesh.fsdp=2", "train.steps=1000", "train.eval_every=none", "checkpoint.save_every=1000")
    limits = ("watchdog.data_s=3", "watchdog.step_s=30")
    with several(str(config), *words, *limits, "name=slow", devices=1) as children:
        wait_for_steps(tiny, "slow", 30, children)
        children[1].send_signal(signal.SIGQUIT)
        first, second = all_ended(children)
    assert (first.code, second.code) == (HungError.exit_code,) * 2, (first, second)
    (warning,) = (line for line in first.err.splitlines() if "process 1" in line and "holds up the others" in line)
    names(warning, "process 1 ms of each step")
    rows = read_metrics(tiny.directory("slow") / "metrics.jsonl")
    named_at = int(warning.split("step ")[1].split(":")[0])
    last_fast = max(row["step"] for row in rows if row["step"] < named_at and row.get("step_time_s", 0) < 0.25)
    assert 12 < named_at <= last_fast + 20, warning
    assert rows[-1]["slowest_process"] == 1
    assert rows[-1]["slowest_devices_slowdown"] >= 1  # measured after step 60 at the latest, when most steps were slow
    for each in first, second:
        (line,) = (line for line in each.err.splitlines() if line.startswith("error: "))
        names(line, "process 1 is at step waiting for data others at step")
    stacks = sorted((tiny.directory("slow") / "stacks").iterdir())
    assert [path.name[-10:] for path in stacks].count("rank-0.txt") == 2 == len(stacks) / 2
    texts = [path.read_text() for path in stacks if path.name.endswith("rank-1.txt")]
    assert sum("SIGQUIT" in text for text in texts) == 1
    assert any("in slow" in text and "no progress" in text for text in texts)
