"""The loop: what it waits for, what it reports, and what it does after a step."""

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfra.errors import Preempted
from jaxinfra.run import Run
from jaxinfra.runtime.signals import RunSignals
from jaxinfra.train.statistics import step_flops
from jaxinfra.train.step_timer import StepTimer
from jaxinfra.train.trainer import Trainer
from tests.tiny_run import Tiny


class Recorded(Trainer):
    """A trainer whose events are recorded in order, instead of being written anywhere."""

    def __init__(self, run: Run, step: Any):
        super().__init__(run)
        self.events: list[tuple[Any, ...]] = []
        self.program.train_step = step
        self._trackers = self
        self._peak = {"flops": 1000.0 / self.program.mesh.size}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.events.append(("log", step, dict(metrics)))

    def finish_step(self, step: int) -> None:
        pass

    def evaluate(self) -> dict[str, float]:
        self.events.append(("evaluate", int(self.state)))
        return {"eval/loss": float(self.state)}

    def save(self, metrics: Any = None, *, force: bool = False) -> None:
        self.events.append(("save", self.completed_steps, int(self.state)))


def count(state: jax.Array, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    return state + 1, {"loss": state * 1.0}


def trainer(tiny: Tiny, *, done: int = 0, log_every: int = 1, **train: Any) -> Recorded:
    run = tiny.loaded()
    run = replace(run, train=replace(run.train, **train), track=replace(run.track, log_every=log_every))
    made = Recorded(run, count)
    made.state, made.completed_steps = jnp.full((), done, jnp.int32), done
    return made


def fit(made: Recorded, stop_reason: Any = lambda completed_steps: None) -> str | None:
    return made.fit([(step, {}) for step in range(made.completed_steps, made.run.train.steps)], stop_reason)


def test_order_of_events(tiny: Tiny) -> None:
    """After a step: report it, evaluate, save. The report of a step comes while the next one runs."""
    made = trainer(tiny, steps=4, eval_every=3)
    assert fit(made) is None
    assert (int(made.state), made.completed_steps) == (4, 4)
    assert [event[:2] for event in made.events] == [
        ("save", 1),
        ("log", 1),
        ("save", 2),
        ("log", 2),
        ("log", 3),
        ("evaluate", 3),
        ("log", 3),
        ("save", 3),
        ("log", 4),
        ("evaluate", 4),
        ("log", 4),
        ("save", 4),
    ]
    assert [event[2]["loss"] for event in made.events if event[0] == "log" and "loss" in event[2]] == [0, 1, 2, 3]
    assert [event[2] for event in made.events if event[0] == "save"] == [1, 2, 3, 4]


def test_stop(tiny: Tiny) -> None:
    """The step that runs is finished, reported and offered to be saved; the last one is no stop."""
    made = trainer(tiny, steps=9, eval_every=None)
    reasons = itertools.chain([None, None], itertools.repeat("SIGTERM"))
    assert fit(made, lambda completed_steps: next(reasons)) == "SIGTERM"
    assert (int(made.state), made.completed_steps) == (3, 3)
    assert [event[1] for event in made.events if event[0] == "log"] == [1, 2, 3]
    assert ("save", 3, 3) in made.events
    at_the_end = trainer(tiny, steps=3, eval_every=None, done=2)
    assert fit(at_the_end, lambda completed_steps: "SIGTERM") is None and at_the_end.completed_steps == 3


def test_going_on_counts_from_there(tiny: Tiny) -> None:
    made = trainer(tiny, steps=7, eval_every=5, done=4)
    fit(made)
    assert made.completed_steps == 7
    assert [event[1] for event in made.events if event[0] == "save"] == [5, 6, 7]
    assert [event[1] for event in made.events if event[0] == "evaluate"] == [5, 7]


def test_only_due_metrics_leave_the_devices(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    made, fetched = trainer(tiny, steps=10, eval_every=None, log_every=4), []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda values: fetched.append(values) or get(values))
    fit(made)
    assert [event[1] for event in made.events if event[0] == "log" and "loss" in event[2]] == [4, 8, 10]
    # Of each step only what the guard looks at: the loss, and whether the step was skipped.
    assert len([values for values in fetched if isinstance(values, tuple) and len(values) == 2]) == 10
    assert len([values for values in fetched if isinstance(values, dict)]) == 3
    logged = [event[2] for event in made.events if event[0] == "log" and "loss" in event[2]]
    assert [values["loss_mean"] for values in logged] == [1.5, 5.5, 8.5]


def test_hot_path_moves_nothing_unasked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run with evaluations, saves and logs: no transfer in the loop but explicit ones."""
    calls, fit = [], Trainer.fit

    def guarded(*arguments: Any) -> str | None:
        calls.append(arguments)
        with jax.transfer_guard("disallow"):
            with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
                jnp.sin(np.ones(3))
            return fit(*arguments)

    monkeypatch.setattr(Trainer, "fit", guarded)
    assert tiny.launch("track.console=off").code == 0
    assert len(calls) == 1


def test_reported_time_is_that_of_finished_steps(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on while the loop waits for the devices and at no other time."""
    made, clock = trainer(tiny, steps=24, eval_every=None, log_every=8), SimpleNamespace(now_s=0.0)

    def wait(values: Any) -> Any:
        clock.now_s += 0.5
        return values

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    fit(made)
    timed = [event[2] for event in made.events if event[0] == "log" and "step_time_s" in event[2]]
    assert [row["step_time_s"] for row in timed] == [0.5] * 3
    tokens, flops = 8 * 32, step_flops(made.program)
    assert [(row["tokens_per_s"], row["mfu"]) for row in timed] == [(2 * tokens, 2 * flops / 1000)] * 3


def test_step_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps count; the one after a pause was not timed whole."""
    times_s = iter([0.0, 1.0, 3.0, 50.0, 52.0, 54.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times_s))
    timer = StepTimer()
    assert timer.read() is None
    timer.finish_step()
    assert timer.read() is None
    timer.finish_step()
    timer.finish_step()
    assert timer.read() == 1.5
    assert timer.read() is None
    timer.pause()
    timer.finish_step()
    timer.finish_step()
    timer.pause()
    timer.finish_step()
    assert timer.read() == 2.0


def test_a_resumed_run_keeps_its_peak(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured on CPUs: otherwise MFU would jump at a resume."""
    stopping = Trainer(tiny.loaded("track.console=off"))
    monkeypatch.setattr(RunSignals, "stops_after", lambda self, completed_steps: "SIGTERM")
    with pytest.raises(Preempted):
        stopping.train()
    monkeypatch.undo()
    first = json.loads(stopping.run_dir.record.read_text())["peak"]
    assert Trainer(tiny.loaded("track.console=off")).train()["peak_flops_per_device"] == first["flops"]
