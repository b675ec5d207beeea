"""Maximal update parametrization (muP): the best learning rate of a narrow model is also that of a wide one.

After Yang et al. 2022, "Tensor Programs V", tables 3 and 8, relative to a base width (docs/transfer.md). The model
has the factors on activations (`ModelConfig.in_mup`), an optimizer those on updates (`Optimizer.width_factor`).
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxinfra.errors import ConfigError
from jaxinfra.parallel.spec import Params, ParamSpec, ParamSpecs, leaves_by_name


def with_growth(specs: ParamSpecs, narrow: ParamSpecs) -> ParamSpecs:
    """Sets how the fans of parameters have grown since `narrow`, those of the same model at the base width.

    Raises ConfigError if these are not the same parameters with other sizes.
    """
    ndims = [{name: len(spec.shape) for name, spec in leaves_by_name(tree).items()} for tree in (specs, narrow)]
    if others := [name for name in {**ndims[0], **ndims[1]} if ndims[0].get(name) != ndims[1].get(name)]:
        raise ConfigError(
            f"optim.base_width: at that width the model has another {others[0]}, or none; let its with_width change "
            "sizes, but not which parameters there are"
        )

    def grown(spec: ParamSpec, base: ParamSpec) -> ParamSpec:
        growth = [size / base_size for size, base_size in zip(spec.shape, base.shape, strict=True)]
        fans = (math.prod(growth[dim] for dim in dims) for dims in (spec.in_dims, spec.out_dims))
        return replace(spec, fan_in=next(fans), fan_out=next(fans))

    return jax.tree.map(grown, specs, narrow)


def rescale(params: Params, narrow: Params, specs: ParamSpecs, ratio: float) -> Params:
    """Gives initial values their variances: 1 / fan-in^2 in an output layer, 1 / fan-in in another, else the base's.

    The initializers are taken to be powers of the width, of multiples of 1/2, which `narrow` has `ratio` times smaller.
    """

    def rescaled(spec: ParamSpec, x: jax.Array, base: jax.Array) -> jax.Array:
        if spec.state == "buffer" or spec.role in ("norm", "bias"):
            return x
        rms, base_rms = (jnp.sqrt(jnp.mean(jnp.square(each.astype(jnp.float32)))) for each in (x, base))
        power = jnp.round(2 * jnp.log(rms / base_rms) / math.log(ratio)) / 2
        wanted = 0.0 if spec.fan_in == 1 else -1.0 if spec.fan_out == 1 else -0.5
        return x * jnp.where(base_rms > 0, ratio ** (wanted - power), 1.0).astype(x.dtype)

    return jax.tree.map(rescaled, specs, params, narrow)
