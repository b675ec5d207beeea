"""The optimiser of a run: its config, and the optax chain that follows from it.

Not for clipping and averaged weights: the train step calls `transforms.clip_by_global_norm` before the chain
and `transforms.ema_update` after it.

Invariants: weight decay is decoupled from the gradient, multiplied by the learning rate (Loshchilov & Hutter
2019) and goes only to parameters whose role is in `OptimConfig.decay_roles`. Update t (from 0) uses the schedule's
rate at t.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, assert_never

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt

from jaxinfra.config import NOT_FINGERPRINTED, Problem
from jaxinfra.config.limits import Count, Decay, NonNegative, Positive, PositiveShare
from jaxinfra.optim.adafactor import scale_by_factored_rms, scale_by_param_rms
from jaxinfra.optim.matrix_dims import is_hidden_matrix, is_param_spec, matrix_dims
from jaxinfra.optim.muon import orthogonalize
from jaxinfra.optim.offload import store_state_on_host
from jaxinfra.optim.schedules import Cosine, LRSchedule, optax_schedule
from jaxinfra.optim.transforms import store_state_as
from jaxinfra.parallel.spec import Role


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2).

    Attributes:
        b1: decay of the mean of the gradient.
        b2: decay of the mean of its square.
        eps: added to the root of the second mean, after bias correction.
        weight_decay: fraction of a parameter taken away per unit of learning rate.
    """

    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1


@dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adam's second moment in rows and columns, no first moment (Shazeer & Stern 2018, Algorithm 4).

    Attributes:
        decay_power: the moment of update t (from 1) decays by `1 - t ** -decay_power`.
        min_factored_dim: matrices with fewer rows or columns keep their whole second moment.
        clip_rms: limit on the root mean square of one matrix's update before the rate; None for no limit.
        scale_by_param: multiply the rate by the parameter's own root mean square, as the paper does; the peak
            rate is then relative, about 1e-2.
        min_param_rms: the least root mean square that `scale_by_param` takes.
        weight_decay: fraction of a parameter taken away per unit of learning rate.
    """

    decay_power: PositiveShare = 0.8
    min_factored_dim: Annotated[int, Ge(2)] = 128
    clip_rms: Annotated[float, Gt(0)] | None = 1.0
    scale_by_param: bool = True
    min_param_rms: Positive = 1e-3
    weight_decay: NonNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class Lion:
    """The sign of an interpolated momentum (Chen et al. 2023, Algorithm 2).

    Every element moves by the whole rate, so the peak wants to be 3 to 10 times lower than AdamW's and the
    weight decay as much higher (section 5 there).

    Attributes:
        b1: weight of the momentum in the update.
        b2: decay of the momentum.
        weight_decay: fraction of a parameter taken away per unit of learning rate.
    """

    b1: Decay = 0.9
    b2: Decay = 0.99
    weight_decay: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class SGD:
    """Stochastic gradient descent with heavy-ball or Nesterov momentum (Sutskever et al. 2013, section 2).

    Attributes:
        momentum: `m <- g + momentum * m`; 0 keeps no state.
        nesterov: step along `g + momentum * m` instead of `m`.
        weight_decay: fraction of a parameter taken away per unit of learning rate, past the momentum.
    """

    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: NonNegative = 0.0

    def problems(self) -> Iterable[Problem]:
        """Nesterov's step needs momentum."""
        if self.nesterov and self.momentum == 0:
            yield Problem(
                fields=("momentum", "nesterov"),
                message="Nesterov's step without momentum is plain descent",
                fix="use momentum=0.9 or nesterov=False",
            )


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for hidden matrices, AdamW for all else (Jordan et al. 2024).

    Attributes:
        momentum: decay of the momentum of matrices.
        nesterov: orthogonalise `g + momentum * m` instead of `m`.
        iterations: of Newton-Schulz.
        scale: "rms" scales updates to AdamW's usual size, so that both halves share one rate (Liu et al.
            2025); "width" is the original `sqrt(max(1, cols / rows))`, whose peak rate is about 0.02.
        matmul_dtype: of the Newton-Schulz products; bfloat16 halves what moves between devices.
        b1: AdamW's, for the rest.
        b2: AdamW's, for the rest.
        eps: AdamW's, for the rest.
        weight_decay: fraction of a parameter taken away per unit of learning rate, in both halves.
    """

    momentum: Decay = 0.95
    nesterov: bool = True
    iterations: Count = 5
    scale: Literal["rms", "width"] = "rms"
    matmul_dtype: Literal["float32", "bfloat16"] = "float32"
    b1: Decay = 0.9
    b2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1


type Optimizer = AdamW | Adafactor | Lion | SGD | Muon


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How parameters move.

    Attributes:
        optimizer: the update rule.
        schedule: the learning rate's course, as a fraction of the peak.
        peak_lr: the highest learning rate.
        clip_norm: limit on the global norm of the gradient; None for no limit.
        ema_decay: of an averaged copy of the parameters; None keeps none.
        state_dtype: what the optimiser's arrays are stored in; it computes in float32 either way.
        offload: keep the optimiser's arrays in host memory between steps.
        decay_roles: parameters of these roles are decayed.
    """

    optimizer: Optimizer = AdamW()
    schedule: LRSchedule = Cosine()
    peak_lr: Positive = 3e-4
    clip_norm: Annotated[float, Gt(0)] | None = 1.0
    ema_decay: Decay | None = None
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: Annotated[bool, NOT_FINGERPRINTED] = False
    decay_roles: tuple[Role, ...] = ("matrix", "embedding", "head")

    def problems(self) -> Iterable[Problem]:
        """Means that bfloat16 can keep: it rounds changes of less than 2**-8 of a value away."""
        if self.state_dtype != "bfloat16":
            return
        if isinstance(self.optimizer, Adafactor):
            yield Problem(
                fields=("state_dtype", "optimizer.decay_power"),
                message="bfloat16 rounds late changes of Adafactor's second moment away, and saves little",
                fix="use state_dtype=float32",
            )
        for name in ("b1", "b2", "momentum"):
            if (decay := getattr(self.optimizer, name, 0.0)) > 1 - 2**-8:
                yield Problem(
                    fields=("state_dtype", f"optimizer.{name}"),
                    message=f"bfloat16 rounds the changes of a mean with {name}={decay} away",
                    fix=f"use state_dtype=float32 or optimizer.{name}=0.99",
                )


def make_optimizer(optim: OptimConfig, *, steps: int, specs: Any) -> optax.GradientTransformation:
    """The optax chain of a run of `steps` steps over parameters declared by `specs`, a tree of `ParamSpec`.

    Its `update` needs the parameters and returns float32 updates to add to them (`optax.apply_updates`).
    State is sharded like the parameters, which may be abstract at `init`. Gradients are not clipped here.
    """
    rate = optax_schedule(optim.schedule, peak_lr=optim.peak_lr, steps=steps)

    def chain(specs: Any) -> optax.GradientTransformation:
        decayed = jax.tree.map(lambda spec: spec.role in optim.decay_roles, specs, is_leaf=is_param_spec)
        links = [_direction(optim.optimizer, specs)]
        if optim.optimizer.weight_decay:
            links.append(optax.add_decayed_weights(optim.optimizer.weight_decay, mask=decayed))
        links.append(optax.scale_by_learning_rate(rate))
        return store_state_as(optax.chain(*links), jnp.dtype(optim.state_dtype))

    return store_state_on_host(chain, specs) if optim.offload else chain(specs)


def _direction(optimizer: Optimizer, specs: Any) -> optax.GradientTransformation:
    """The update before weight decay and learning rate."""
    match optimizer:
        case AdamW():
            return optax.scale_by_adam(optimizer.b1, optimizer.b2, optimizer.eps)
        case Adafactor():
            scaled = scale_by_factored_rms(
                specs,
                decay_power=optimizer.decay_power,
                min_factored_dim=optimizer.min_factored_dim,
                clip_rms=optimizer.clip_rms,
            )
            if not optimizer.scale_by_param:
                return scaled
            return optax.chain(scaled, scale_by_param_rms(specs, min_rms=optimizer.min_param_rms))
        case Lion():
            return optax.scale_by_lion(optimizer.b1, optimizer.b2)
        case SGD():
            if optimizer.momentum == 0:
                return optax.identity()
            return optax.trace(optimizer.momentum, optimizer.nesterov)
        case Muon():
            return _muon(optimizer, specs)
    assert_never(optimizer)


def _muon(muon: Muon, specs: Any) -> optax.GradientTransformation:
    blocks = jax.tree.map(
        lambda spec: matrix_dims(spec) if is_hidden_matrix(spec) else optax.MaskedNode(), specs, is_leaf=is_param_spec
    )
    # Newton-Schulz does not see the scale of its input, so the sum that `trace` keeps does for the paper's
    # mean.
    matrices = optax.chain(
        optax.trace(muon.momentum, muon.nesterov),
        orthogonalize(blocks, iterations=muon.iterations, scale=muon.scale, dtype=jnp.dtype(muon.matmul_dtype)),
    )
    rest = optax.scale_by_adam(muon.b1, muon.b2, muon.eps)
    labels = jax.tree.map(lambda spec: "muon" if is_hidden_matrix(spec) else "adamw", specs, is_leaf=is_param_spec)
    return optax.partition({"muon": matrices, "adamw": rest}, labels)
