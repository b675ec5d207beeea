"""The layers that models are made of, as Flax NNX modules.

A module is built without arrays: its parameters hold `ParamSpec`s. `Program` splits it once into a graph definition and
a tree of specs, and merges arrays in when it traces a step. Modules are never mutated.

Shape suffixes: B batch, T length, D residual width, F MLP width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.models.remat import save_dot
from jaxinfra.ops.dot import dot
from jaxinfra.ops.norm import layer_norm, rms_norm
from jaxinfra.parallel.rules import LogicalAxes, Role
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Initializer, ParamSpec, ParamState, constant, normal

type NormType = Literal["rmsnorm", "layernorm"]
type MlpType = Literal["swiglu", "geglu", "gelu"]

RESIDUAL: LogicalAxes = ("batch", "positions")
"""The sharded dimensions of the residual stream between blocks."""

SEQUENCE: LogicalAxes = ("batch", "sequence")
"""The sharded dimensions of activations inside attention and MLP."""


@dataclass(frozen=True, kw_only=True)
class ParamFactory:
    """Declares parameters of one layer, or of `num_layers` layers stacked in a leading dimension (0: not stacked)."""

    partitioner: Partitioner
    num_layers: int = 0

    def param(
        self,
        shape: tuple[int, ...],
        axes: LogicalAxes,
        init: Initializer,
        role: Role,
        *,
        batch_dims: int = 0,
        in_dims: int = 0,
        state: ParamState = "trained",
    ) -> nnx.Param:
        """Declares a parameter.

        A matrix has the dimensions [batch dims, input dims, output dims]; the matmul contracts the input dims. Other
        parameters have `in_dims=0`.
        """
        if self.num_layers:
            shape, axes, batch_dims = (self.num_layers, *shape), ("layers", *axes), batch_dims + 1
        inputs = outputs = ()
        if in_dims:
            inputs = tuple(range(batch_dims, batch_dims + in_dims))
            outputs = tuple(range(batch_dims + in_dims, len(shape)))
        return nnx.Param(
            ParamSpec(shape=shape, axes=axes, init=init, role=role, in_dims=inputs, out_dims=outputs, state=state)
        )


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, features: int, *, norm_type: NormType, eps: float, offset: float = 0.0, params: ParamFactory):
        self.eps, self.offset, self.partitioner = eps, offset, params.partitioner
        self.scale = params.param((features,), (None,), constant(1.0 - offset), "norm")
        self.bias = params.param((features,), (None,), constant(0.0), "bias") if norm_type == "layernorm" else None

    def __call__(self, x: jax.Array, axes: LogicalAxes = RESIDUAL) -> jax.Array:
        """Normalizes `x` `[..., features]`; `axes` are its leading logical axes."""
        scale = self.partitioner.gather_weight(self.scale[...], (None,), axes)
        if self.bias is None:
            return self.partitioner.map_local(partial(rms_norm, eps=self.eps, offset=self.offset), x, scale)
        bias = self.partitioner.gather_weight(self.bias[...], (None,), axes)
        return self.partitioner.map_local(partial(layer_norm, eps=self.eps), x, scale, bias)


class Linear(nnx.Module):
    """A matmul with optional bias.

    Args:
        in_shape: contracted dimensions.
        out_shape: output dimensions.
        axes: logical axes of the weight.
        parallelism: as in tensor parallelism. "column" takes gathered positions and returns sharded features. "row"
            contracts sharded features and reduce-scatters over the positions of the residual stream. "sequence" takes
            the sharded positions of the residual stream and returns unsharded features.
        bias: whether to add a bias.
        params: declares the parameters.
        scale: factor on the initial weights.
        save_output: whether remat policies may save the output.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: LogicalAxes,
        *,
        parallelism: Literal["column", "row", "sequence"],
        bias: bool,
        params: ParamFactory,
        scale: float = 1.0,
        save_output: bool = True,
    ):
        self.in_dims, self.parallelism, self.axes = len(in_shape), parallelism, axes
        self.partitioner, self.save_output = params.partitioner, save_output
        init = normal(scale * math.prod(in_shape) ** -0.5)
        self.weight = params.param((*in_shape, *out_shape), axes, init, "matrix", in_dims=self.in_dims)
        out_axes = axes[self.in_dims :]
        self.bias_axes = (None,) * len(out_axes) if parallelism == "row" else out_axes
        self.bias = params.param(out_shape, self.bias_axes, constant(0.0), "bias") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, *in_shape]` to `[B, T, *out_shape]`."""
        partitioner = self.partitioner
        x_axes = RESIDUAL if self.parallelism == "sequence" else SEQUENCE
        w = partitioner.gather_weight(self.weight[...], self.axes, x_axes)
        multiply = partial(
            dot, in_dims=self.in_dims, flatten=partitioner.platform != "tpu", quantize=partitioner.quantize
        )
        if self.parallelism != "row":
            y = multiply(x, w)
            return self._add_bias(save_dot(y) if self.save_output else y, x_axes)
        unreduced = frozenset(a for name in self.axes[: self.in_dims] for a in partitioner.mesh_axes(name))
        y = multiply(x, w, unreduced=unreduced)
        return self._add_bias(save_dot(partitioner.shard(y, *RESIDUAL, None)), RESIDUAL)

    def _add_bias(self, y: jax.Array, y_axes: LogicalAxes) -> jax.Array:
        if self.bias is None:
            return y
        bias = self.partitioner.gather_weight(self.bias[...], self.bias_axes, y_axes)
        return self.partitioner.map_local(jnp.add, y, bias)


ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": partial(jax.nn.gelu, approximate=True), "gelu": jax.nn.gelu}


class MLP(nnx.Module):
    """SwiGLU and GeGLU (Shazeer 2020): `down(act(gate(x)) * up(x))`; GELU: `down(gelu(up(x)))`."""

    def __init__(
        self,
        hidden_size: int,
        mlp_dim: int,
        *,
        mlp_type: MlpType,
        bias: bool,
        out_scale: float,
        params: ParamFactory,
    ):
        linear = partial(Linear, bias=bias, params=params)
        column = partial(linear, (hidden_size,), (mlp_dim,), ("embed", "mlp"), parallelism="column")
        self.mlp_type = mlp_type
        self.gate = None if mlp_type == "gelu" else column()
        self.up = column()
        self.down = linear((mlp_dim,), (hidden_size,), ("mlp", "embed"), parallelism="row", scale=out_scale)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Takes gathered positions and returns positions sharded like the residual stream."""
        act = ACTIVATIONS[self.mlp_type]
        up_BTF = self.up(x_BTD)
        hidden_BTF = act(up_BTF) if self.gate is None else act(self.gate(x_BTD)) * up_BTF
        return self.down(hidden_BTF)
