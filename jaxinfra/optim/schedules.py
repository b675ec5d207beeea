"""The learning rate as a function of the step.

Not for choosing the peak or the length of a run: both are arguments, so that one schedule fits many runs.

Steps count from 0: the update that step t makes uses `lr(t)`. All schedules share these end points:

- With `warmup_steps=w > 0`, `lr(t) = peak_lr * t / w` for t < w: step 0 has rate 0 and **step w is the first
  with the peak**. With `warmup_steps=0`, step 0 has the peak.
- Decaying schedules reach `final_fraction * peak_lr` exactly at step `steps`, one after the last update, so
  no update is spent at the final rate; the last one, step `steps - 1`, is one notch above it.
- Beyond `steps` the rate stays where it was at `steps`, except for `InverseSqrt`, which has no end.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxinfra.config import Problem
from jaxinfra.config.limits import Natural, PositiveShare, Share


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """Holds the fields that every schedule has.

    Attributes:
        warmup_steps: steps of linear warm-up from 0; this step is the first with the peak rate.
    """

    warmup_steps: Natural = 0


@dataclass(frozen=True, kw_only=True)
class Constant(Warmup):
    """The peak from the end of warm-up on."""


@dataclass(frozen=True, kw_only=True)
class Linear(Warmup):
    """A straight line from the peak down.

    Attributes:
        final_fraction: the rate at the end of the run, as a fraction of the peak.
    """

    final_fraction: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Warmup):
    """Half a cosine from the peak down (Loshchilov & Hutter 2017, section 3, without restarts).

    Attributes:
        final_fraction: the rate at the end of the run, as a fraction of the peak.
    """

    final_fraction: Share = 0.1


@dataclass(frozen=True, kw_only=True)
class WSD(Warmup):
    """Warm-up, stable, decay: the peak is kept until a short decay ends the run (Hu et al. 2024, section 4).

    Attributes:
        decay_fraction: the decay takes `round(decay_fraction * steps)` steps at the end of the run.
        shape: of the decay: "linear", or "sqrt" for one minus a square root (Haegele et al. 2024, section 3).
        final_fraction: the rate at the end of the run, as a fraction of the peak.
    """

    decay_fraction: PositiveShare = 0.2
    shape: Literal["linear", "sqrt"] = "sqrt"
    final_fraction: Share = 0.0

    def decay_steps(self, steps: int) -> int:
        """How many of a run's `steps` decay."""
        return round(self.decay_fraction * steps)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Warmup):
    """`peak_lr * sqrt(w / t)` with `w = max(warmup_steps, 1)` (Vaswani et al. 2017, section 5.3).

    It has no end: the rate goes on falling beyond the last step.
    """


type LRSchedule = Constant | Linear | Cosine | WSD | InverseSqrt


def optax_schedule(config: LRSchedule, *, peak_lr: float, steps: int) -> optax.Schedule:
    """The learning rate of a run of `steps` steps, as the function of the step that optax wants."""

    def lr(step: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return learning_rate(config, step, peak_lr=peak_lr, steps=steps)

    return lr


def learning_rate(config: LRSchedule, step: Any, *, peak_lr: float, steps: int) -> Any:
    """The learning rate of `step`, an integer or an array of them, in a run of `steps` steps.

    The rates have the shape of `step`. JAX arrays, traced ones too, give float32 JAX arrays; anything else is computed
    in NumPy's float64 and starts no device.
    """
    xp = jnp if isinstance(step, jax.Array) else np
    t = xp.asarray(step, xp.float32 if xp is jnp else xp.float64)
    warmup = xp.minimum(t / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    return peak_lr * warmup * _decay(config, t, steps, xp)


def lr_table(config: LRSchedule, *, peak_lr: float, steps: int, rows: int = 11) -> list[tuple[int, float]]:
    """About `rows` pairs (step, rate), evenly spread from step 0 to the last step, and the end of warm-up."""
    spread = {round(at) for at in np.linspace(0, steps - 1, rows)}
    chosen = sorted(spread | {min(config.warmup_steps, steps - 1)})
    return [(at, float(learning_rate(config, at, peak_lr=peak_lr, steps=steps))) for at in chosen]


def schedule_problems(config: LRSchedule, steps: int, *, path: str = "") -> Iterable[Problem]:
    """Yields what cannot work in a run of `steps` steps; fields are named under `path`, as in "optim.schedule."."""
    if config.warmup_steps and config.warmup_steps >= steps:
        yield Problem(
            fields=(f"{path}warmup_steps",),
            message=f"step {config.warmup_steps} has the peak rate, but the last step is {steps - 1}",
            fix=f"use {path}warmup_steps={steps // 10}, or more steps",
        )
    elif isinstance(config, WSD) and config.warmup_steps + config.decay_steps(steps) > steps:
        yield Problem(
            fields=(f"{path}warmup_steps", f"{path}decay_fraction"),
            message=f"warm-up and {config.decay_steps(steps)} steps of decay do not fit into {steps} steps",
            fix=f"use {path}warmup_steps={steps - config.decay_steps(steps)} or less",
        )


def _decay(config: LRSchedule, t: Any, steps: int, xp: ModuleType) -> Any:
    """The rate after warm-up as a fraction of the peak; 1 during warm-up."""
    match config:
        case Constant():
            return xp.ones_like(t)
        case InverseSqrt():
            first = max(config.warmup_steps, 1)
            return xp.sqrt(first / xp.maximum(t, first))
        case Linear():
            left = 1 - _progress(t, config.warmup_steps, steps, xp)
        case Cosine():
            left = (1 + xp.cos(np.pi * _progress(t, config.warmup_steps, steps, xp))) / 2
        case WSD():
            progress = _progress(t, steps - config.decay_steps(steps), steps, xp)
            left = 1 - (xp.sqrt(progress) if config.shape == "sqrt" else progress)
    return config.final_fraction + (1 - config.final_fraction) * left


def _progress(t: Any, start: int, stop: int, xp: ModuleType) -> Any:
    """0 up to step `start`, 1 from step `stop` on, straight in between."""
    return xp.clip((t - start) / max(stop - start, 1), 0.0, 1.0)
