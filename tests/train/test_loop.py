"""The loop: what it waits for, what it reports, and what it does after a step."""

import itertools
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfra.session
from jaxinfra.train.clock import StepClock
from jaxinfra.train.loop import Hooks, Outcome, Reporter, TrainConfig, Work, fit
from tests.tiny_run import Tiny


class Events(list):
    """What the loop does, in order."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.append(("log", step, dict(metrics)))

    def evaluate(self, state: Any) -> dict[str, float]:
        self.append(("evaluate", int(state)))
        return {"eval/loss": float(state)}

    def save(self, done: int, state: Any, values: Any) -> None:
        self.append(("save", done, int(state)))


def stand_in(step: Any, **config: Any) -> Any:
    return SimpleNamespace(run=SimpleNamespace(train=TrainConfig(**config)), train_step=step)


def loop(program: Any, state: Any, events: Events, *, done: int = 0, log_every: int = 1, stop: Any = None) -> Outcome:
    steps = program.run.train.steps
    hooks = Hooks(
        log=events.log,
        due=lambda step: (step + 1) % log_every == 0 or step + 1 == steps,
        waited_s=lambda: 0.0,
        evaluate=events.evaluate,
        save=events.save,
        stop=stop or (lambda: None),
    )
    batches = ((step, {}) for step in range(done, steps))
    reporter = Reporter(hooks, Work(modality="token", units=10, flops=100.0, peak=1000.0))
    return fit(program, state, done, batches, hooks, reporter)


def count(state: jax.Array, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
    return state + 1, {"loss": state * 1.0}


def test_order_of_events() -> None:
    """After a step: report it, evaluate, save. The report of a step comes while the next one runs."""
    events = Events()
    outcome = loop(stand_in(count, steps=4, eval_every=3), jnp.zeros((), jnp.int32), events)
    assert (int(outcome.state), outcome.done, outcome.stopped) == (4, 4, None)
    assert [event[:2] for event in events] == [
        ("save", 1),
        ("log", 0),
        ("save", 2),
        ("log", 1),
        ("log", 2),
        ("evaluate", 3),
        ("log", 2),
        ("save", 3),
        ("log", 3),
        ("evaluate", 4),
        ("log", 3),
        ("save", 4),
    ]
    assert [event[2]["loss"] for event in events if event[0] == "log" and "loss" in event[2]] == [0, 1, 2, 3]
    assert [event[2] for event in events if event[0] == "save"] == [1, 2, 3, 4]


def test_stop() -> None:
    """The step that runs is finished, reported and offered to be saved; the last one is no stop."""
    events = Events()
    reasons = itertools.chain([None, None], itertools.repeat("SIGTERM"))
    outcome = loop(
        stand_in(count, steps=9, eval_every=None), jnp.zeros((), jnp.int32), events, stop=lambda: next(reasons)
    )
    assert (int(outcome.state), outcome.done, outcome.stopped) == (3, 3, "SIGTERM")
    assert [event[1] for event in events if event[0] == "log"] == [0, 1, 2]
    assert ("save", 3, 3) in events
    at_the_end = loop(
        stand_in(count, steps=1, eval_every=None), jnp.zeros((), jnp.int32), Events(), stop=lambda: "SIGTERM"
    )
    assert (at_the_end.done, at_the_end.stopped) == (1, None)


def test_going_on_counts_from_there() -> None:
    events = Events()
    outcome = loop(stand_in(count, steps=7, eval_every=5), jnp.full((), 4, jnp.int32), events, done=4)
    assert outcome.done == 7
    assert [event[1] for event in events if event[0] == "save"] == [5, 6, 7]
    assert [event[1] for event in events if event[0] == "evaluate"] == [5, 7]


def test_only_due_metrics_leave_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda values: fetched.append(values) or get(values))
    events = Events()
    loop(stand_in(count, steps=10, eval_every=None), jnp.zeros((), jnp.int32), events, log_every=4)
    assert [event[1] for event in events if event[0] == "log" and "loss" in event[2]] == [3, 7, 9]
    assert len(fetched) == 3
    assert all(isinstance(values["loss"], jax.Array) for values in fetched)


def test_hot_path_moves_nothing_unasked(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run with evaluations, saves and logs: no transfer in the loop but explicit ones."""
    calls = []

    def guarded(*arguments: Any) -> Outcome:
        calls.append(arguments)
        with jax.transfer_guard("disallow"):
            with pytest.raises(jax.errors.JaxRuntimeError, match="host-to-device"):
                jnp.sin(np.ones(3))
            return fit(*arguments)

    monkeypatch.setattr(jaxinfra.session, "fit", guarded)
    assert tiny.launch("track.console=off").code == 0
    assert len(calls) == 1


def test_reported_time_is_that_of_finished_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on while the loop waits for the devices and at no other time."""
    clock, events = SimpleNamespace(now_s=0.0), Events()

    def wait(values: Any) -> Any:
        clock.now_s += 0.5
        return values

    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now_s)
    loop(stand_in(count, steps=24, eval_every=None), jnp.zeros((), jnp.int32), events, log_every=8)
    timed = [event[2] for event in events if event[0] == "log" and "step_time_s" in event[2]]
    assert [row["step_time_s"] for row in timed] == [0.5] * 3
    assert [(row["tokens_per_s"], row["mfu"]) for row in timed] == [(20.0, 0.2)] * 3


def test_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole steps count; the one after a pause was not timed whole."""
    times_s = iter([0.0, 1.0, 3.0, 50.0, 52.0, 54.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times_s))
    clock = StepClock()
    assert clock.read() is None
    clock.finished()
    assert clock.read() is None
    clock.finished()
    clock.finished()
    assert clock.read() == 1.5
    assert clock.read() is None
    clock.pause()
    clock.finished()
    clock.finished()
    clock.pause()
    clock.finished()
    assert clock.read() == 2.0
