"""The optimizers, and the optax chain of a run.

The train step itself clips gradients and averages weights (`optim.transforms`).

Weight decay is decoupled: it is multiplied by the learning rate (Loshchilov & Hutter 2019), and applies only to
parameters whose role is in `OptimConfig.decay_roles`. Update t (from 0) uses the learning rate of step t.
"""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, override

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt

from jaxinfra.config import Problem
from jaxinfra.config.limits import DecayRate, NonNegativeFloat, PositiveFloat, PositiveFraction, PositiveInt
from jaxinfra.errors import ConfigError
from jaxinfra.optim.adafactor import scale_by_factored_rms, scale_by_param_rms
from jaxinfra.optim.config import OptimConfig, Optimizer
from jaxinfra.optim.matrix_dims import MatrixDims, is_hidden_matrix, matrix_dims
from jaxinfra.optim.muon import orthogonalize
from jaxinfra.optim.offload import store_state_on_host
from jaxinfra.optim.schedules import optax_schedule
from jaxinfra.optim.state_dtype import store_state_as
from jaxinfra.parallel.spec import ParamSpec, PyTree
from jaxinfra.user_code import user_code_errors


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2).

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment, after bias correction.
        weight_decay: fraction of a parameter subtracted per unit of learning rate.
    """

    elementwise: ClassVar[bool] = True
    b1: DecayRate = 0.9
    b2: DecayRate = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1

    @override
    def transform(self, specs: PyTree) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor: a factored second moment and no first moment (Shazeer & Stern 2018, Algorithm 4).

    Attributes:
        decay_power: update t (from 1) decays the second moment by `1 - t ** -decay_power`.
        min_factored_dim: matrices with fewer rows or columns are not factored.
        clip_rms: limit on the root mean square of one matrix's update before the learning rate; None for no limit.
        scale_by_param: multiply the learning rate by the parameter's root mean square, as the paper does; the peak is
            then relative, about 1e-2.
        min_param_rms: lower bound of that root mean square.
        weight_decay: fraction of a parameter subtracted per unit of learning rate.
    """

    decay_power: PositiveFraction = 0.8
    min_factored_dim: Annotated[int, Ge(2)] = 128
    clip_rms: Annotated[float, Gt(0)] | None = 1.0
    scale_by_param: bool = True
    min_param_rms: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.0

    @override
    def transform(self, specs: PyTree) -> optax.GradientTransformation:
        scaled = scale_by_factored_rms(
            specs, decay_power=self.decay_power, min_factored_dim=self.min_factored_dim, clip_rms=self.clip_rms
        )
        if not self.scale_by_param:
            return scaled
        return optax.chain(scaled, scale_by_param_rms(specs, min_rms=self.min_param_rms))

    @override
    def width_factor(self, spec: ParamSpec) -> float:
        own = 0 if not self.scale_by_param else 1 if spec.fan_out == 1 else 0.5  # power of the parameter's size
        return spec.fan_in ** (own - 1)

    @override
    def problems_in_low_precision(self) -> Iterable[Problem]:
        yield Problem(
            fields=("state_dtype", "optimizer.decay_power"),
            message="rounding loses late changes of Adafactor's second moment, and saves little memory",
            fix="use state_dtype=float32",
        )


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion: the sign of an interpolated momentum (Chen et al. 2023, Algorithm 2).

    Every element changes by the full learning rate, so use a peak 3 to 10 times lower than AdamW's and a weight decay
    higher by the same factor (section 5).

    Attributes:
        b1: weight of the momentum in the update.
        b2: decay of the momentum.
        weight_decay: fraction of a parameter subtracted per unit of learning rate.
    """

    elementwise: ClassVar[bool] = True
    b1: DecayRate = 0.9
    b2: DecayRate = 0.99
    weight_decay: NonNegativeFloat = 1.0

    @override
    def transform(self, specs: PyTree) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with heavy-ball or Nesterov momentum (Sutskever et al. 2013, section 2).

    Attributes:
        momentum: `m <- g + momentum * m`; 0 keeps no state.
        nesterov: update with `g + momentum * m` instead of `m`.
        weight_decay: fraction of a parameter subtracted per unit of learning rate, without momentum.
    """

    elementwise: ClassVar[bool] = True
    momentum: DecayRate = 0.9
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    def problems(self) -> Iterable[Problem]:
        """Yields a problem if `nesterov` is set without momentum."""
        if self.nesterov and self.momentum == 0:
            yield Problem(
                fields=("momentum", "nesterov"),
                message="nesterov has no effect without momentum",
                fix="use momentum=0.9 or nesterov=False",
            )

    @override
    def transform(self, specs: PyTree) -> optax.GradientTransformation:
        return optax.identity() if self.momentum == 0 else optax.trace(self.momentum, self.nesterov)

    @override
    def width_factor(self, spec: ParamSpec) -> float:
        raise ConfigError("optim.parametrization=mup: is for updates of a fixed size; use optim.optimizer=adamw")


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Orthogonalized momentum for hidden matrices, AdamW for all other parameters (Jordan et al. 2024).

    Attributes:
        momentum: decay of the momentum.
        nesterov: orthogonalize `g + momentum * m` instead of `m`.
        iterations: Newton-Schulz iterations.
        scale: "rms" scales updates to AdamW's usual size, so that both share one learning rate (Liu et al. 2025);
            "width" is the original `sqrt(max(1, cols / rows))`, with a peak of about 0.02.
        matmul_dtype: dtype of the Newton-Schulz products; bfloat16 halves the transfers between devices.
        b1: decay of the first moment in the AdamW of other parameters.
        b2: decay of its second moment.
        eps: added to the root of its second moment.
        weight_decay: fraction of a parameter subtracted per unit of learning rate, for all parameters.
    """

    momentum: DecayRate = 0.95
    nesterov: bool = True
    iterations: PositiveInt = 5
    scale: Literal["rms", "width"] = "rms"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    b1: DecayRate = 0.9
    b2: DecayRate = 0.95
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.1

    @override
    def transform(self, specs: PyTree) -> optax.GradientTransformation:
        def dims(spec: ParamSpec) -> MatrixDims | optax.MaskedNode:
            return matrix_dims(spec) if is_hidden_matrix(spec) else optax.MaskedNode()

        dims_tree = jax.tree.map(dims, specs)
        # `trace` sums gradients, the paper averages them. The result of Newton-Schulz does not depend on the scale.
        matrices = optax.chain(
            optax.trace(self.momentum, self.nesterov),
            orthogonalize(dims_tree, iterations=self.iterations, scale=self.scale, dtype=jnp.dtype(self.matmul_dtype)),
        )
        others = optax.scale_by_adam(self.b1, self.b2, self.eps)
        labels = jax.tree.map(lambda spec: "muon" if is_hidden_matrix(spec) else "adamw", specs)
        return optax.partition({"muon": matrices, "adamw": others}, labels)

    @override
    def width_factor(self, spec: ParamSpec) -> float:
        if not is_hidden_matrix(spec):
            return 1 / spec.fan_in
        growth = spec.fan_out / spec.fan_in  # of the square of the norm (Yang, Simon & Bernstein 2023, section 3)
        return math.sqrt(growth / (max(spec.fan_in, spec.fan_out) if self.scale == "rms" else max(1.0, growth)))


def make_optimizer(optim: OptimConfig, *, steps: int, specs: PyTree) -> optax.GradientTransformation:
    """Makes the optax chain of a run of `steps` steps, without clipping; `specs` are the `ParamSpec`s.

    `update` needs the parameters and returns float32 updates for `optax.apply_updates`. The state is sharded like the
    parameters, which may be abstract in `init`.
    """
    rate = optax_schedule(optim.schedule, peak_lr=optim.peak_lr, steps=steps)

    def chain(specs: PyTree) -> optax.GradientTransformation:
        decayed = jax.tree.map(lambda spec: spec.role in optim.decay_roles, specs)
        links: list[optax.GradientTransformation] = [_transform(optim.optimizer, specs)]
        if optim.parametrization == "mup":  # before weight decay, which does not depend on the width
            factors = jax.tree.map(optim.optimizer.width_factor, specs)
            links.append(optax.stateless(lambda updates, _: jax.tree.map(operator.mul, updates, factors)))
        if optim.optimizer.weight_decay:
            links.append(optax.add_decayed_weights(optim.optimizer.weight_decay, mask=decayed))
        links.append(optax.scale_by_learning_rate(rate))
        stored = store_state_as(optax.chain(*links), optim.state_dtype)
        return _checked(stored, type(optim.optimizer).__qualname__)

    return store_state_on_host(chain, specs) if optim.offload else chain(specs)


def _transform(optimizer: Optimizer, specs: PyTree) -> optax.GradientTransformation:
    """Returns the optimizer's transformation; ConfigError if it is not an optax.GradientTransformation."""
    with user_code_errors(type(optimizer), "optim.optimizer"):
        tx = optimizer.transform(specs)
    if not isinstance(tx, optax.GradientTransformation):
        name = type(optimizer).__qualname__
        raise ConfigError(f"{name}.transform: returned {type(tx).__name__}; return an optax.GradientTransformation")
    return tx


def _checked(tx: optax.GradientTransformation, name: str) -> optax.GradientTransformation:
    """Wraps `tx`, of the optimizer class with this name, to check the form of its updates while it is traced.

    Raises ConfigError if they are not like parameters, or an update changes the type of the optimizer state.
    """

    def types(tree: PyTree) -> tuple[PyTree, list[tuple[tuple[int, ...], jnp.dtype]]]:
        return jax.tree.structure(tree), [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        new_updates, new_state = tx.update(updates, state, params)
        if jax.tree.structure(new_updates) != jax.tree.structure(params):
            raise ConfigError(f"{name}: its updates are another tree than the parameters; return one array for each")
        if types(state) != types(new_state):
            raise ConfigError(
                f"{name}: an update changes the shapes or types of its state; keep those that init returns"
            )
        return new_updates, new_state

    return optax.GradientTransformation(tx.init, update)
