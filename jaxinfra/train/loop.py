"""The training loop: dispatch a step, report the one before it while it runs.

No step waits for the host: metrics stay on the devices until they are due, and the only wait is for the step
before the one that runs. The order of things after a step: report, evaluate, save, stop if asked to.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import jax

from jaxinfra.compiler import OptionSet
from jaxinfra.config import NOT_FINGERPRINTED
from jaxinfra.config.limits import Count
from jaxinfra.errors import NonFiniteError
from jaxinfra.program import Program, TrainState
from jaxinfra.track.memory import rss_bytes
from jaxinfra.train.clock import StepClock


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train and in what batches.

    Attributes:
        steps: updates of the parameters, over the whole run.
        global_batch: samples (sequences, images) of one step, over all devices.
        accumulate: microbatches that a step is computed in, one after the other.
        eval_every: steps between evaluations; there is one at the end as well. None: only that one.
        eval_samples: validation samples to evaluate on; None is all.
        compiler: a set of options for the compiler of the steps (see `jaxinfra.compiler`).
    """

    steps: Count = 1000
    global_batch: Count = 32
    accumulate: Annotated[Count, NOT_FINGERPRINTED] = 1
    eval_every: Annotated[Count | None, NOT_FINGERPRINTED] = 100
    eval_samples: Count | None = None
    compiler: Annotated[OptionSet, NOT_FINGERPRINTED] = "default"

    def evaluates(self, done: int) -> bool:
        """Whether there is an evaluation after `done` steps."""
        return done == self.steps or (self.eval_every is not None and done % self.eval_every == 0)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls besides the step.

    Attributes:
        log: takes the metrics of a step, counted from 0, when they are due.
        due: whether the metrics of a step are.
        waited_s: seconds that were waited for batches so far.
        evaluate: metrics of the state on validation data.
        save: offers the state after so many steps to be saved, and the device values of the last of them.
        stop: why to stop now; None goes on.
    """

    log: Callable[[int, Mapping[str, float]], object]
    due: Callable[[int], bool]
    waited_s: Callable[[], float]
    evaluate: Callable[[TrainState], Mapping[str, float]]
    save: Callable[[int, TrainState, Mapping[str, jax.Array]], object]
    stop: Callable[[], str | None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step is.

    Attributes:
        modality: what it is counted in, such as "token".
        units: how many of them.
        flops: floating-point operations over all devices.
        peak: what all devices together could do in a second.
    """

    modality: str
    units: int
    flops: float
    peak: float


class Reporter:
    """Turns the device values of finished steps into metrics."""

    def __init__(self, hooks: Hooks, work: Work):
        self._hooks, self._work = hooks, work
        self._clock = StepClock()
        self._waited_s = 0.0

    def finished(self, step: int, values: Mapping[str, jax.Array]) -> None:
        """Waits for the step, and logs its metrics if they are due; a NonFiniteError where they are no numbers."""
        jax.block_until_ready(values)
        self._clock.finished()
        if not self._hooks.due(step):
            return
        metrics = finite(step, values)
        step_time_s = self._clock.read()
        if step_time_s is not None:
            metrics["step_time_s"] = step_time_s
            metrics[f"{self._work.modality}s_per_s"] = self._work.units / step_time_s
            metrics["mfu"] = self._work.flops / step_time_s / self._work.peak
        waited_s = self._hooks.waited_s()
        metrics["data_wait_s"], self._waited_s = waited_s - self._waited_s, waited_s
        metrics["rss_bytes"] = rss_bytes()
        metrics |= device_memory()
        self._hooks.log(step, metrics)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs an evaluation; its time is no step's."""
        self._clock.pause()
        self._hooks.log(step, metrics)


def finite(step: int, values: Mapping[str, jax.Array]) -> dict[str, float]:
    """The values of a step on the host; a NonFiniteError where the loss or the norm of the gradient is not finite."""
    metrics = {name: float(value) for name, value in jax.device_get(dict(values)).items()}
    for name in ("loss", "grad_norm"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise NonFiniteError(
                f"step {step}: {name} is {metrics[name]}; nothing was saved since: start the same command with a lower "
                "optim.peak_lr, a longer warm-up, or another data.seed"
            )
    return metrics


def device_memory() -> dict[str, float]:
    """Bytes in use on the fullest local device, and its peak; empty where the platform does not tell."""
    stats = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"device_in_use_bytes": "bytes_in_use", "device_peak_bytes": "peak_bytes_in_use"}
    return {name: float(max(s[key] for s in stats)) for name, key in names.items() if stats and key in stats[0]}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the loop ended.

    Attributes:
        state: after the last step.
        done: steps that it has seen.
        stopped: why it stopped early, None if it did not.
    """

    state: TrainState
    done: int
    stopped: str | None


def fit(
    program: Program,
    state: TrainState,
    done: int,
    batches: Iterable[tuple[int, dict[str, jax.Array]]],
    hooks: Hooks,
    reporter: Reporter,
) -> Outcome:
    """Trains the state, which has seen `done` steps and is given up, until batches end or somebody asks to stop.

    The batches are those of the steps from `done` on, on the devices.
    """
    config = program.run.train
    pending: tuple[int, Mapping[str, jax.Array]] | None = None
    for step, batch in batches:
        state, values = program.train_step(state, batch)
        if pending is not None:
            reporter.finished(*pending)
        pending, done = (step, values), step + 1
        if config.evaluates(done):
            reporter.finished(*pending)
            pending = None
            reporter.evaluated(step, hooks.evaluate(state))
        hooks.save(done, state, values)
        if reason := hooks.stop():
            break
    else:
        reason = None
    if pending is not None:
        reporter.finished(*pending)
        finite(*pending)
    return Outcome(state=state, done=done, stopped=reason if done < config.steps else None)
