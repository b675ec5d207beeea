"""The optimizer's config, and the base classes of optimizers and learning-rate schedules. Imports no JAX."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Gt

from jaxinfra.config import NOT_FINGERPRINTED, Extensible, Problem
from jaxinfra.config.limits import DecayRate, PositiveFloat, PositiveInt
from jaxinfra.parallel.rules import Role

if TYPE_CHECKING:
    import jax
    import numpy as np
    import optax

    from jaxinfra.parallel.spec import ParamSpec, PyTree

type StateDtype = Literal["float32", "bfloat16", "bfloat16_stochastic", "8bit"]
"""How optimizer state is stored (`optim.state_dtype`)."""


class Optimizer(Extensible, ABC):
    """An update rule: a frozen dataclass that inherits from this class and defines `transform`.

    Attributes:
        elementwise: whether the update of an element depends on its own gradients and values alone. `train.canonical`
            needs that; each class must declare it itself, since a subclass may override `transform`.
        weight_decay: fraction of a parameter subtracted per unit of learning rate, after `transform`.
    """

    elementwise: ClassVar[bool] = False
    builtins: ClassVar[tuple[str, ...]] = tuple(
        f"jaxinfra.optim.optimizers:{name}" for name in ("AdamW", "Adafactor", "Lion", "SGD", "Muon")
    )
    weight_decay: float = 0.0

    @abstractmethod
    def transform(self, specs: "PyTree") -> "optax.GradientTransformation":
        """Returns the optax transformation of gradients into updates, before weight decay and learning rate.

        It must not scale by a learning rate or by -1: use `optax.scale_by_adam`, not `optax.adam`. Create the state
        with `jnp.zeros_like(param)`, so that it is sharded like the parameters. `specs` are their `ParamSpec`s.
        """

    def width_factor(self, spec: "ParamSpec") -> float:
        """Returns the factor of muP on the updates of a parameter, by its fans; this one if their size is fixed."""
        return 1 / spec.fan_in

    def problems_in_low_precision(self) -> Iterable[Problem]:
        """Yields reasons to store the state in float32 only; field paths start at `OptimConfig`."""
        return ()


class LRSchedule(Extensible, ABC):
    """A learning-rate schedule: a frozen dataclass that inherits from this class and defines `multiplier`.

    Attributes:
        warmup_steps: steps of linear warmup from 0 to the peak, which the framework adds to every schedule.
    """

    builtins: ClassVar[tuple[str, ...]] = tuple(
        f"jaxinfra.optim.schedules:{name}" for name in ("Cosine", "Constant", "Linear", "WSD", "InverseSqrt")
    )
    warmup_steps: int = 0

    @abstractmethod
    def multiplier(self, step: "jax.Array | np.ndarray", steps: int, xp: ModuleType) -> "jax.Array | np.ndarray":
        """Returns the learning rate as a fraction of the peak; during warmup, whose ramp it is multiplied by, 1.

        `step` is an array of floats, traced or not, counted from the start of the run, which has `steps` steps. `xp` is
        `jax.numpy` or `numpy`.
        """

    def problems_in_run(self, steps: int, path: str) -> Iterable[Problem]:
        """Yields conflicts with a run of `steps` steps; `path` is the prefix of fields, such as "optim.schedule."."""
        if self.warmup_steps and self.warmup_steps >= steps:
            yield Problem(
                fields=(f"{path}warmup_steps",),
                message=f"the last step is {steps - 1}, before the end of warmup",
                fix=f"use {path}warmup_steps={steps // 10}, or more steps",
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning-rate schedule, and the treatment of gradients, parameters and state.

    Attributes:
        optimizer: the update rule.
        schedule: the learning rate as a fraction of the peak.
        peak_lr: the highest learning rate.
        parametrization: "mup" keeps the best `peak_lr` the same at all widths (see docs/transfer.md).
        base_width: the `model.hidden_size` at which "mup" is the same run as "standard".
        clip_norm: limit on the global norm of the gradient; None for no limit.
        ema_decay: decay of the moving average of parameters; None keeps no average.
        state_dtype: dtype of the stored optimizer state; computation is in float32. "bfloat16_stochastic" rounds to
            bfloat16 at random, "8bit" has the blocks of bitsandbytes (see docs/precision.md).
        offload: whether to keep the optimizer state in host memory between steps.
        decay_roles: roles of the parameters that weight decay applies to.
        frozen: patterns of paths ("embedding", "blocks.*") of parameters that keep their initial values.
    """

    optimizer: Optimizer = field(default_factory=Optimizer.default)
    schedule: LRSchedule = field(default_factory=LRSchedule.default)
    peak_lr: PositiveFloat = 3e-4
    parametrization: Literal["standard", "mup"] = "standard"
    base_width: PositiveInt | None = None
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    ema_decay: DecayRate | None = None
    state_dtype: StateDtype = "float32"
    offload: Annotated[bool, NOT_FINGERPRINTED] = False
    decay_roles: tuple[Role, ...] = ("matrix", "embedding", "head")
    frozen: tuple[str, ...] = ()

    def problems(self) -> Iterable[Problem]:
        """Yields moments that bfloat16 cannot store: it rounds away changes of less than 2**-8 of a value."""
        if self.state_dtype != "float32":
            yield from self.optimizer.problems_in_low_precision()
        if self.state_dtype != "bfloat16":
            return
        for name in ("b1", "b2", "momentum"):
            if (decay := getattr(self.optimizer, name, 0.0)) > 1 - 2**-8:
                yield Problem(
                    fields=("state_dtype", f"optimizer.{name}"),
                    message=f"bfloat16 rounds away the changes of a moment with {name}={decay}",
                    fix=f"use state_dtype=bfloat16_stochastic or optimizer.{name}=0.99",
                )
