"""The loop: what it waits for, what it reports, and what it does after a step."""

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any, override

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import ConfigError, Preempted
from jaxinfra.processes.requests import RunSignals
from jaxinfra.run import Run
from jaxinfra.track.tracker import MultiTracker
from jaxinfra.train.cadence import Cadence
from jaxinfra.train.due import Due
from jaxinfra.train.energy import Energy
from jaxinfra.train.interval import Interval
from jaxinfra.train.loop import Loop
from jaxinfra.train.numerics import Numerics
from jaxinfra.train.profiler import Profiler
from jaxinfra.train.reporting import Reporting
from jaxinfra.train.statistics import step_flops
from jaxinfra.train.trainer import Trainer
from jaxinfra.train.waiting import Waiting
from jaxinfra.train.watch import Watch
from tests.refusals import raises
from tests.tiny_run import Tiny


class Recorded(MultiTracker):
    """A loop whose events are recorded in order; what is logged is written nowhere."""

    def __init__(self, run: Run, step: Any, done: int):
        super().__init__()
        self.events: list[tuple[Any, ...]] = []
        self.job = Trainer(run).job
        self.job.program.train_step = step
        watch = Watch(run.watchdog, self.job.run_dir, self.job.peers, Energy(run.track, self.job.peers))
        numerics = Numerics(self.job.program, watch.phases)
        peak_flops = 1000.0 / self.job.program.mesh.size
        self.reporting = Reporting(
            self.job, watch, numerics, self, peak_flops=peak_flops, skipped=lambda completed_steps: {}
        )
        self.requests = SimpleNamespace(stops_after=lambda step: None, saves_after=lambda step: None)
        self.loop = Loop(
            self.job,
            jnp.full((), done, jnp.int32),
            done,
            self.reporting,
            Profiler(run.profile, Path()),
            Waiting(self.reporting),
            Cadence(run.checkpoint, done, 1),
            self.requests,
            check_owner=lambda: None,
            after_step=self.after_step,
            save=lambda: self.events.append(("save", self.loop.completed_steps)),
        )

    @override
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("log", step, dict(metrics)))

    def after_step(self, due: Due, metrics: Any) -> None:
        self.events.append(("after", self.loop.completed_steps, due, int(self.loop.state)))
        assert int(metrics["loss"]) == self.loop.completed_steps - 1

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [event for event in self.events if event[0] == kind]


class Batches:
    """Empty batches, of which some come late."""

    def __init__(self, first: int, late: Mapping[int, int]) -> None:
        self.step, self.late = first, dict(late)

    def poll(self, timeout_s: float) -> tuple[int, dict] | None:
        if self.late.get(self.step, 0):
            self.late[self.step] -= 1
            return None
        self.step += 1
        return self.step - 1, {}


def count(state: jax.Array, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    return state + 1, {"loss": state * 1.0}


def recorded(tiny: Tiny, *, done: int = 0, log_every: int = 1, **train: Any) -> Recorded:
    run = tiny.loaded()
    run = replace(run, train=replace(run.train, **train), track=replace(run.track, log_every=log_every))
    return Recorded(run, count, done)


def fit(made: Recorded, late: Mapping[int, int] = MappingProxyType({})) -> str | None:
    reason = made.loop.run(Batches(made.loop.completed_steps, late).poll, made.job.run.train.steps)
    made.reporting.finish()
    return reason


def test_order_of_events(tiny: Tiny) -> None:
    """The report of a step comes while the next one runs, or before what is due after it."""
    made = recorded(tiny, steps=4, eval_every=3)
    assert fit(made) is None
    assert (int(made.loop.state), made.loop.completed_steps) == (4, 4)
    assert [event[:2] for event in made.events] == [
        ("after", 1),
        ("log", 1),
        ("after", 2),
        ("log", 2),
        ("log", 3),
        ("after", 3),
        ("log", 4),
        ("after", 4),
    ]
    assert [event[2].evaluation for event in made.of("after")] == [False, False, True, True]
    assert [event[2]["loss"] for event in made.of("log")] == [0, 1, 2, 3]
    assert [event[3] for event in made.of("after")] == [1, 2, 3, 4]


def test_stop(tiny: Tiny) -> None:
    """The step that runs is finished, and reported."""
    made = recorded(tiny, steps=9, eval_every=None)
    made.requests.stops_after = lambda step: "SIGTERM" if step >= 3 else None
    assert fit(made) == "SIGTERM"
    assert (int(made.loop.state), made.loop.completed_steps) == (3, 3)
    assert [event[1] for event in made.of("log")] == [1, 2, 3]


def test_requests_are_met_while_a_batch_is_late(tiny: Tiny) -> None:
    """Before the first step there is nothing to save; later the last step is reported before it is saved."""
    made, asked = recorded(tiny, steps=9, eval_every=None), iter([None, None, "SIGUSR1"])
    made.requests.saves_after = lambda step: next(asked, None)
    made.requests.stops_after = lambda step: "SIGTERM" if made.of("save") else None
    assert fit(made, late={0: 3, 2: 1000}) == "SIGTERM"
    assert [event[:2] for event in made.events] == [("after", 1), ("log", 1), ("after", 2), ("log", 2), ("save", 2)]


def test_going_on_counts_from_there(tiny: Tiny) -> None:
    made = recorded(tiny, steps=7, eval_every=5, done=4)
    fit(made)
    assert made.loop.completed_steps == 7
    assert [(event[1], event[2].evaluation) for event in made.of("after")] == [(5, True), (6, False), (7, True)]


def test_only_due_metrics_leave_the_devices(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made, fetched = recorded(tiny, steps=10, eval_every=None, log_every=4), []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda values: fetched.append(values) or get(values))
    fit(made)
    assert [event[1] for event in made.events if event[0] == "log" and "loss" in event[2]] == [1, 4, 8, 10]
    # Of each step only what the guard looks at: the loss, and whether the step was skipped.
    assert len([values for values in fetched if isinstance(values, tuple) and len(values) == 2]) == 10
    assert len([values for values in fetched if isinstance(values, dict)]) == 4
    logged = [event[2] for event in made.events if event[0] == "log" and "loss" in event[2]]
    assert [values["loss_mean"] for values in logged] == [0.0, 2.0, 5.5, 8.5]


def test_hot_path_moves_nothing_unasked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run with evaluations, saves and logs: no transfer in the loop but explicit ones."""
    calls, run = [], Loop.run

    def guarded(*arguments: Any) -> str | None:
        calls.append(arguments)
        with jax.transfer_guard("disallow"):
            with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
                jnp.sin(np.ones(3))
            return run(*arguments)

    monkeypatch.setattr(Loop, "run", guarded)
    assert tiny.launch("track.console=off").code == 0
    assert len(calls) == 1


def test_reported_time_is_that_of_finished_steps(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on while the loop waits for the devices and at no other time."""
    made, clock = recorded(tiny, steps=24, eval_every=None, log_every=8), SimpleNamespace(now_s=0.0)

    def wait(values: Any) -> Any:
        clock.now_s += 0.5
        return values

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    fit(made)
    timed = [event[2] for event in made.events if event[0] == "log" and "step_time_s" in event[2]]
    assert [row["step_time_s"] for row in timed] == [0.5] * 3
    tokens, flops = 8 * 32, step_flops(made.job.program)
    assert [(row["tokens_per_s"], row["mfu"]) for row in timed] == [(2 * tokens, 2 * flops / 1000)] * 3


def test_whole_steps_are_timed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after a pause was not timed whole."""
    interval, clock = Interval(Trainer(tiny.loaded()).program), SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)

    def finish_step(now_s: float) -> None:
        clock.now_s = now_s
        interval.finish_step()

    def mean_s() -> float | None:
        return interval.read(waited_s=0.0, peak_flops=1.0).get("step_time_s")

    assert mean_s() is None
    finish_step(0.0)
    assert mean_s() is None
    finish_step(1.0)
    finish_step(3.0)
    assert mean_s() == 1.5
    assert mean_s() is None
    interval.pause()
    finish_step(50.0)
    finish_step(52.0)
    interval.pause()
    finish_step(54.0)
    assert mean_s() == 2.0


def test_a_resumed_run_keeps_its_peak(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured on CPUs: otherwise MFU would jump at a resume."""
    stopping = Trainer(tiny.loaded("track.console=off"))
    monkeypatch.setattr(RunSignals, "stops_after", lambda self, completed_steps: "SIGTERM")
    with pytest.raises(Preempted):
        stopping.train()
    monkeypatch.undo()
    first = json.loads(stopping.run_dir.record.read_text())["peak"]
    assert Trainer(tiny.loaded("track.console=off")).train()["peak_flops_per_device"] == first["flops"]


def test_what_another_trainer_has_saved_is_found(tiny: Tiny) -> None:
    looking = Trainer(tiny.loaded("track.console=off"))
    with raises(ConfigError, f"{looking.run_dir.location} call train() first"):
        looking.evaluate()
    summary = Trainer(tiny.loaded("track.console=off")).train()
    assert looking.evaluate()["eval/loss"] == summary["validation"]["loss"]
