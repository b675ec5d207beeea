"""The loop: what it waits for, what it reports, and what it does after a step."""

import itertools
import queue
import threading
import time
from collections.abc import Iterator, Mapping
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


class Steps:
    """Batches that are there already: one step after the other, each with the same arrays."""

    def __init__(self, start: int, stop: int):
        self.data_wait_s = 0.0
        self._steps = iter(range(start, stop))

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        return self

    def __next__(self) -> tuple[int, dict]:
        return next(self._steps), {}


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
        log=events,
        due=lambda step: (step + 1) % log_every == 0 or step + 1 == steps,
        evaluate=events.evaluate,
        save=events.save,
        stop=stop or (lambda: None),
    )
    batches = Steps(done, steps)
    reporter = Reporter(hooks, batches, Work(unit="token", units=10, flops=100.0, peak=1000.0))
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


@jax.jit
def heavy(state: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 40, lambda _, a: (a @ a) * (1.0 / a.shape[0]), state)


class Watch:
    """A clock of its own: a thread that waits for the result of every step and notes the time."""

    def __init__(self) -> None:
        self.dispatch_s: list[float] = []
        self.finished_s: list[float] = []
        self._results: queue.Queue[jax.Array | None] = queue.Queue()
        self._thread = threading.Thread(target=self._wait)
        self._thread.start()

    def step(self, state: jax.Array, batch: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        start_s = time.perf_counter()
        state = heavy(state)
        self.dispatch_s.append(time.perf_counter() - start_s)
        self._results.put(state)
        return state, {"loss": state}

    def close(self) -> None:
        self._results.put(None)
        self._thread.join()

    def _wait(self) -> None:
        while (result := self._results.get()) is not None:
            result.block_until_ready()
            self.finished_s.append(time.perf_counter())


def test_reported_time_is_that_of_finished_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clocks agree on the time a step takes; the time that its dispatch takes would be far off."""
    state = jnp.ones((448, 448))
    heavy(state).block_until_ready()
    monkeypatch.setattr(jax, "device_get", lambda values: {"loss": 0.0})
    watch, events = Watch(), Events()
    monkeypatch.setattr(events, "evaluate", lambda state: {})
    monkeypatch.setattr(events, "save", lambda done, state, values: None)
    try:
        loop(stand_in(watch.step, steps=24, eval_every=None), state, events, log_every=8)
    finally:
        watch.close()
    reported_s = [event[2]["step_time_s"] for event in events if "step_time_s" in event[2]]
    steps = np.diff(watch.finished_s)
    means_s = [steps[:7].mean(), steps[7:15].mean(), steps[15:].mean()]
    assert reported_s == pytest.approx(means_s, rel=0.1)
    assert np.median(watch.dispatch_s) < 0.2 * np.mean(reported_s)
    assert events[0][2]["tokens_per_s"] == pytest.approx(10 / reported_s[0])
    assert events[0][2]["mfu"] == pytest.approx(100 / reported_s[0] / 1000)


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
