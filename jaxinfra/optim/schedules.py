"""Learning-rate schedules: the learning rate as a function of the step.

The peak and the length of a run are arguments, so one schedule fits many runs. Step t (from 0) uses `lr(t)`:

- With `warmup_steps=w > 0`, `lr(t) = peak_lr * t / w` for t < w, so step w is the first with the peak. With
  `warmup_steps=0`, step 0 has the peak.
- Decaying schedules reach `final_fraction * peak_lr` at step `steps`, one after the last update.
- Beyond `steps` the rate is constant, except for `InverseSqrt`, which keeps falling.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, override

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfra.config import Problem
from jaxinfra.config.limits import Fraction, NonNegativeInt, PositiveFraction
from jaxinfra.optim.config import LRSchedule
from jaxinfra.user_code import user_code_errors

type Array = jax.Array | np.ndarray
"""JAX arrays while a step is traced, NumPy arrays where a schedule is printed: `xp` is the module that fits."""


@dataclass(frozen=True, kw_only=True)
class Warmup(LRSchedule):
    """A schedule with linear warmup, the base of all schedules of this module.

    Attributes:
        warmup_steps: steps of linear warmup from 0.
    """

    warmup_steps: NonNegativeInt = 0


@dataclass(frozen=True, kw_only=True)
class Constant(Warmup):
    """The peak, after warmup."""

    @override
    def multiplier(self, step: Array, steps: int, xp: ModuleType) -> Array:
        return xp.ones_like(step)


@dataclass(frozen=True, kw_only=True)
class Linear(Warmup):
    """Linear decay from the peak.

    Attributes:
        final_fraction: the rate at the end of the run, as a fraction of the peak.
    """

    final_fraction: Fraction = 0.0

    @override
    def multiplier(self, step: Array, steps: int, xp: ModuleType) -> Array:
        remaining = 1 - _progress(step, self.warmup_steps, steps, xp)
        return self.final_fraction + (1 - self.final_fraction) * remaining


@dataclass(frozen=True, kw_only=True)
class Cosine(Warmup):
    """Half a cosine from the peak (Loshchilov & Hutter 2017, section 3, without restarts).

    Attributes:
        final_fraction: the rate at the end of the run, as a fraction of the peak.
    """

    final_fraction: Fraction = 0.1

    @override
    def multiplier(self, step: Array, steps: int, xp: ModuleType) -> Array:
        remaining = (1 + xp.cos(np.pi * _progress(step, self.warmup_steps, steps, xp))) / 2
        return self.final_fraction + (1 - self.final_fraction) * remaining


@dataclass(frozen=True, kw_only=True)
class WSD(Warmup):
    """Warmup, stable, decay: the peak until a short decay at the end of the run (Hu et al. 2024, section 4).

    Attributes:
        decay_fraction: the decay takes the last `round(decay_fraction * steps)` steps.
        shape: "linear" decay, or "sqrt" for one minus a square root (Haegele et al. 2024, section 3).
        final_fraction: the rate at the end of the run, as a fraction of the peak.
    """

    decay_fraction: PositiveFraction = 0.2
    shape: Literal["linear", "sqrt"] = "sqrt"
    final_fraction: Fraction = 0.0

    def decay_steps(self, steps: int) -> int:
        """Returns the number of steps that decay."""
        return round(self.decay_fraction * steps)

    @override
    def multiplier(self, step: Array, steps: int, xp: ModuleType) -> Array:
        progress = _progress(step, steps - self.decay_steps(steps), steps, xp)
        remaining = 1 - (xp.sqrt(progress) if self.shape == "sqrt" else progress)
        return self.final_fraction + (1 - self.final_fraction) * remaining

    @override
    def problems_in_run(self, steps: int, path: str) -> Iterable[Problem]:
        yield from super().problems_in_run(steps, path)
        if self.warmup_steps < steps < self.warmup_steps + self.decay_steps(steps):
            yield Problem(
                fields=(f"{path}warmup_steps", f"{path}decay_fraction"),
                message=f"warmup and {self.decay_steps(steps)} steps of decay do not fit into {steps} steps",
                fix=f"use {path}warmup_steps={steps - self.decay_steps(steps)} or less",
            )


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Warmup):
    """`peak_lr * sqrt(w / t)` with `w = max(warmup_steps, 1)` (Vaswani et al. 2017, section 5.3)."""

    @override
    def multiplier(self, step: Array, steps: int, xp: ModuleType) -> Array:
        first = max(self.warmup_steps, 1)
        return xp.sqrt(first / xp.maximum(step, first))


def optax_schedule(config: LRSchedule, *, peak_lr: float, steps: int) -> Callable[[jax.typing.ArrayLike], Array]:
    """Returns the learning rate of a run of `steps` steps as an `optax.Schedule`, a function of an integer or an array.

    JAX arrays, traced or not, give float32 JAX arrays. Anything else is computed in NumPy, in float64, without
    initializing a device.
    """

    def learning_rate(step: jax.typing.ArrayLike) -> Array:
        xp = jnp if isinstance(step, jax.Array) else np
        t = xp.asarray(step, xp.float32 if xp is jnp else xp.float64)
        warmup = xp.minimum(t / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        with user_code_errors(type(config), "optim.schedule"):
            return peak_lr * warmup * config.multiplier(t, steps, xp)

    return learning_rate


def lr_table(config: LRSchedule, *, peak_lr: float, steps: int, rows: int = 11) -> list[tuple[int, float]]:
    """Returns about `rows` pairs (step, learning rate) from the first step to the last, and the end of warmup."""
    rate = optax_schedule(config, peak_lr=peak_lr, steps=steps)
    evenly_spaced = {round(at) for at in np.linspace(0, steps - 1, rows)}
    chosen = sorted(evenly_spaced | {min(config.warmup_steps, steps - 1)})
    return [(at, float(rate(at))) for at in chosen]


def _progress(step: Array, start: int, stop: int, xp: ModuleType) -> Array:
    """Returns how far a step is from `start` to `stop`, from 0 to 1."""
    return xp.clip((step - start) / max(stop - start, 1), 0.0, 1.0)
