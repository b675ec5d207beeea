"""The layers that a transformer is made of, as Flax NNX modules.

A module is built without arrays: its parameters hold `ParamSpec`s. `Program` splits it once into a graph
definition and a tree of specs, and merges arrays in where a step is traced; modules are never mutated.

Shape suffixes: B batch, T length, D residual width, F MLP width.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.models.remat import product
from jaxinfra.ops.dot import dot
from jaxinfra.ops.norm import layer_norm, rms_norm
from jaxinfra.parallel.rules import LogicalAxes
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Initializer, ParamSpec, Role, constant, normal

BLOCK: LogicalAxes = ("batch", "positions")
"""The spread dimensions of activations between blocks."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Declares parameters in a partitioner, each stacked over so many layers; 0 for those that stand alone."""

    partitioner: Partitioner
    layers: int = 0

    def declare(
        self,
        shape: tuple[int, ...],
        axes: LogicalAxes,
        init: Initializer,
        role: Role,
        *,
        contract: int | None = None,
        apart: int = 0,
        trainable: bool = True,
    ) -> nnx.Param:
        """A parameter, stacked.

        Of a matrix, or of several whose number the first `apart` dimensions are, the next `contract` dimensions are
        contracted and the rest yielded.
        """
        if self.layers:
            shape, axes, apart = (self.layers, *shape), ("layers", *axes), apart + 1
        in_dims = out_dims = ()
        if contract is not None:
            in_dims, out_dims = tuple(range(apart, apart + contract)), tuple(range(apart + contract, len(shape)))
        spec = ParamSpec(
            shape=shape, axes=axes, init=init, role=role, in_dims=in_dims, out_dims=out_dims, trainable=trainable
        )
        return nnx.Param(spec)


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(
        self, width: int, *, kind: Literal["rmsnorm", "layernorm"], eps: float, offset: float = 0.0, stack: Stack
    ):
        self.eps, self.offset, self.partitioner = eps, offset, stack.partitioner
        self.scale = stack.declare((width,), (None,), constant(1.0 - offset), "norm")
        self.bias = stack.declare((width,), (None,), constant(0.0), "bias") if kind == "layernorm" else None

    def __call__(self, x: jax.Array, meets: LogicalAxes = BLOCK) -> jax.Array:
        """Normalises `x` `[..., width]`; `meets` names its spread dimensions."""
        scale = self.partitioner.gather_weight(self.scale[...], (None,), meets)
        if self.bias is None:
            return self.partitioner.map_local(partial(rms_norm, eps=self.eps, offset=self.offset), x, scale)
        bias = self.partitioner.gather_weight(self.bias[...], (None,), meets)
        return self.partitioner.map_local(partial(layer_norm, eps=self.eps), x, scale, bias)


class Linear(nnx.Module):
    """A matrix product with optional bias.

    `inward` weights read the residual stream and yield sharded features; `outward` ones contract sharded features
    back into the stream, and their partial sums are scattered over its positions; `along` ones read the stream where it
    is spread between blocks, and yield whole features there.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: LogicalAxes,
        *,
        direction: Literal["inward", "outward", "along"],
        bias: bool,
        stack: Stack,
        scale: float = 1.0,
        kept: bool = True,
    ):
        """Declares it; `kept` results are those that rematerialisation may keep."""
        self.contract, self.direction, self.partitioner, self.axes = len(in_shape), direction, stack.partitioner, axes
        self.kept = kept
        init = normal(scale * math.prod(in_shape) ** -0.5)
        self.weight = stack.declare((*in_shape, *out_shape), axes, init, "matrix", contract=len(in_shape))
        out_axes = axes[len(in_shape) :]
        self.bias_axes = (None,) * len(out_axes) if direction == "outward" else out_axes
        self.bias = stack.declare(out_shape, self.bias_axes, constant(0.0), "bias") if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, T, *in_shape]` to `[B, T, *out_shape]`; outward results have the sharding between blocks."""
        meets = BLOCK if self.direction == "along" else ("batch", "sequence")
        w, partitioner = self.partitioner.gather_weight(self.weight[...], self.axes, meets), self.partitioner
        multiply = partial(
            dot, contract=self.contract, flat=partitioner.platform != "tpu", quantize=partitioner.quantize
        )
        if self.direction != "outward":
            y = multiply(x, w)
            return self._add_bias(product(y) if self.kept else y, meets)
        partial_over = frozenset(a for name in self.axes[: self.contract] for a in self.partitioner.mesh_axes(name))
        y = multiply(x, w, partial=partial_over)
        return self._add_bias(product(self.partitioner.shard(y, *BLOCK, None)), BLOCK)

    def _add_bias(self, y: jax.Array, meets: LogicalAxes) -> jax.Array:
        if self.bias is None:
            return y
        return self.partitioner.map_local(
            jnp.add, y, self.partitioner.gather_weight(self.bias[...], self.bias_axes, meets)
        )


ACTIVATIONS = {"swiglu": jax.nn.silu, "geglu": partial(jax.nn.gelu, approximate=True), "gelu": jax.nn.gelu}


class MLP(nnx.Module):
    """SwiGLU and GeGLU (Shazeer 2020): `down(act(gate(x)) * up(x))`; GELU: `down(gelu(up(x)))`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kind: Literal["swiglu", "geglu", "gelu"],
        bias: bool,
        out_scale: float,
        stack: Stack,
    ):
        linear = partial(Linear, bias=bias, stack=stack)
        inward = partial(linear, (width,), (hidden,), ("embed", "mlp"), direction="inward")
        self.kind = kind
        self.gate = None if kind == "gelu" else inward()
        self.up = inward()
        self.down = linear((hidden,), (width,), ("mlp", "embed"), direction="outward", scale=out_scale)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """`[B, T, D]`, whole positions in, block positions out."""
        act = ACTIVATIONS[self.kind]
        up_BTF = self.up(x_BTD)
        hidden_BTF = act(up_BTF) if self.gate is None else act(self.gate(x_BTD)) * up_BTF
        return self.down(hidden_BTF)
