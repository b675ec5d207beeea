"""The layers that models are made of, as Flax NNX modules.

A module is built without arrays: its parameters hold `ParamSpec`s (see `models.module`).

Shape suffixes: B batch, T length, V vocabulary, D residual width, F MLP width, H heads, K head dim.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfra.config import Extensible
from jaxinfra.config.limits import PositiveFloat, PositiveInt
from jaxinfra.models.remat import TensorName, name_tensor, save_dot
from jaxinfra.ops.dot import dot
from jaxinfra.ops.norm import layer_norm, rms_norm
from jaxinfra.ops.packed import gather_packed
from jaxinfra.ops.quantized import gather_quantized
from jaxinfra.parallel.rules import LogicalAxes, Role
from jaxinfra.parallel.sharding import Partitioner
from jaxinfra.parallel.spec import Initializer, ParamSpec, ParamState, constant, normal

type Activation = Literal["swiglu", "geglu", "gelu", "clamped_swiglu"]

RESIDUAL: LogicalAxes = ("batch", "positions")
"""The leading logical axes of the residual stream between blocks."""

SEQUENCE: LogicalAxes = ("batch", "sequence")
"""The leading logical axes of activations inside attention and MLP, where positions are all-gathered over `tensor`."""


@dataclass(frozen=True, kw_only=True)
class ParamFactory:
    """Declares the parameters of one layer, or of `num_layers` layers stacked in a leading dimension.

    Attributes:
        partitioner: passed on to the layers.
        num_layers: number of stacked layers; 0 declares parameters without a dimension for layers.
    """

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
        """Declares a parameter; arguments are as in `ParamSpec`, except for `batch_dims` and `in_dims`.

        A matrix has the dimensions [batch dims, input dims, output dims]; the matmul contracts the input dims. Other
        parameters have `in_dims=0`. Experts `[experts, D, F]` have `batch_dims=1, in_dims=1`.
        """
        if self.num_layers:
            shape, axes, batch_dims = (self.num_layers, *shape), ("layers", *axes), batch_dims + 1
        first_out = batch_dims + in_dims
        return nnx.Param(
            ParamSpec(
                shape=shape,
                axes=axes,
                init=init,
                role=role,
                in_dims=tuple(range(batch_dims, first_out)),
                out_dims=tuple(range(first_out, len(shape))) if in_dims else (),
                state=state,
                dtype="float32" if state == "buffer" else None,
            )
        )


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """The norms of a model.

    Attributes:
        type: RMSNorm or LayerNorm.
        eps: added to the variance.
        offset: 1.0 if the weights of RMSNorm are stored as their difference from one (Gemma).
    """

    type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    eps: PositiveFloat = 1e-5
    offset: float = 0.0


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last dimension."""

    def __init__(self, features: int, config: NormConfig, *, params: ParamFactory):
        self.eps, self.offset, self.partitioner = config.eps, config.offset, params.partitioner
        # `rms_norm` multiplies by the scale plus the offset, so both begin as one.
        self.scale = params.param((features,), (None,), constant(1.0 - self.offset), "norm")
        self.bias = params.param((features,), (None,), constant(0.0), "bias") if config.type == "layernorm" else None

    def __call__(self, x: jax.Array, axes: LogicalAxes = RESIDUAL) -> jax.Array:
        """Normalizes `x` `[..., features]`; `axes` are its leading logical axes."""
        scale = self.partitioner.gather_weight(self.scale[...], (None,), axes)
        if self.bias is None:
            return self.partitioner.map_local(partial(rms_norm, eps=self.eps, offset=self.offset), x, scale)
        bias = self.partitioner.gather_weight(self.bias[...], (None,), axes)
        return self.partitioner.map_local(partial(layer_norm, eps=self.eps), x, scale, bias)


class HeadsNorm(nnx.Module):
    """RMSNorm over all heads at once, which may be sharded (OLMo 2)."""

    def __init__(self, num_heads: int, head_dim: int, axis: str, config: NormConfig, *, params: ParamFactory):
        self.eps, self.offset, self.axis, self.partitioner = config.eps, config.offset, axis, params.partitioner
        self.size = num_heads * head_dim
        self.scale = params.param((num_heads, head_dim), (axis, None), constant(1.0 - self.offset), "norm")

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        """Normalizes the heads of each token."""
        head_axes = self.partitioner.mesh_axes(self.axis)

        def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
            squares = jnp.sum(jnp.square(x.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
            squares = jax.lax.psum(squares, head_axes) if head_axes else squares
            inverse = jax.lax.rsqrt(squares / self.size + self.eps)
            return (x.astype(jnp.float32) * inverse * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)

        scale = self.partitioner.gather_weight(self.scale[...], (self.axis, None), SEQUENCE)
        return self.partitioner.map_local(normalize, x_BTHK, scale)


class WeightAdapter(Protocol):
    """Changes the product of a weight that is frozen itself, as `models.low_rank.LowRank` does."""

    def add(self, y: jax.Array, x: jax.Array, x_axes: LogicalAxes) -> jax.Array:
        """Adds to the product `y` of `x` with the weight."""
        ...

    def rescale(self, y: jax.Array, weight: jax.Array, x_axes: LogicalAxes, y_axes: LogicalAxes) -> jax.Array:
        """Rescales the output features of `y`."""
        ...

    def merge(self, weight: jax.Array, x_axes: LogicalAxes) -> jax.Array:
        """Returns the weight as it is with the adapter."""
        ...


def gather_stored(
    partitioner: Partitioner,
    weight: nnx.Param,
    scale: nnx.Param | None,
    axes: LogicalAxes,
    x_axes: LogicalAxes = SEQUENCE,
    *,
    in_dim: int,
) -> jax.Array:
    """Gathers a weight as `Partitioner.gather_weight`; one with scales is packed (see `ops.packed`)."""
    if scale is None:
        return partitioner.gather_weight(weight[...], axes, x_axes)
    return gather_packed(partitioner, weight[...], scale[...], axes, x_axes, in_dim=in_dim)


class Linear(nnx.Module):
    """A matmul with optional bias.

    `models.adapt` may pack the weight, which then has scales, and attach an adapter.

    Args:
        in_shape: sizes of the contracted dimensions.
        out_shape: sizes of the output dimensions.
        axes: logical axes of the weight, `[*in_shape, *out_shape]`.
        parallelism: how tensor parallelism splits the matmul. "column" takes gathered positions and returns sharded
            features. "row" contracts sharded features and reduce-scatters over the positions of the residual stream.
            "sequence" takes the sharded positions of the residual stream and returns unsharded features.
        bias: whether to add a bias.
        params: declares the parameters.
        scale: factor on the initial weights.
        save_output: whether remat policies may save the output as that of a matmul.
        tensor: the name of the output for remat policies.
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
        tensor: TensorName | None = None,
    ):
        self.in_dims, self.parallelism, self.axes = len(in_shape), parallelism, axes
        self.partitioner, self.save_output = params.partitioner, save_output
        self.tensor: TensorName | None = tensor
        init = normal(scale * math.prod(in_shape) ** -0.5)
        self.weight = params.param((*in_shape, *out_shape), axes, init, "matrix", in_dims=self.in_dims)
        out_axes = axes[self.in_dims :]
        # The output of "row" has whole features, to which every device adds a whole bias.
        self.bias_axes = (None,) * len(out_axes) if parallelism == "row" else out_axes
        self.bias = params.param(out_shape, self.bias_axes, constant(0.0), "bias") if bias else None
        self.scale: nnx.Param | None = None
        self.adapter: WeightAdapter | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, *in_shape]` to `[B, T, *out_shape]`."""
        partitioner, row_parallel = self.partitioner, self.parallelism == "row"
        x_axes = RESIDUAL if self.parallelism == "sequence" else SEQUENCE
        y_axes = RESIDUAL if row_parallel else x_axes
        contracted_axes = [axis for name in self.axes[: self.in_dims] for axis in partitioner.mesh_axes(name)]
        weight = self._gather(self.axes, x_axes)
        y = dot(
            x,
            weight,
            in_dims=self.in_dims,
            unreduced=frozenset(contracted_axes if row_parallel else ()),
            flatten=partitioner.platform != "tpu",  # see `ops.dot`
            quantized_w=gather_quantized(partitioner, self.weight[...], self.axes, x_axes, in_dims=self.in_dims),
        )
        if self.adapter is not None:
            y = self.adapter.add(y, x, x_axes)
        if row_parallel:
            y = partitioner.shard(y, *RESIDUAL, None)  # adds up the partial sums of the devices
        if self.adapter is not None:
            y = self.adapter.rescale(y, weight, x_axes, y_axes)
        if self.save_output:
            y = save_dot(y)
        if self.bias is not None:
            bias = partitioner.gather_weight(self.bias[...], self.bias_axes, y_axes)
            y = partitioner.map_local(jnp.add, y, bias)
        return y if self.tensor is None else name_tensor(y, self.tensor)

    def merged(self, axes: LogicalAxes) -> jax.Array:
        """Returns the gathered weight with its adapter, for use without gradients; `axes` may differ from its own."""
        weight = self._gather(axes, SEQUENCE)
        return weight if self.adapter is None else self.adapter.merge(weight, SEQUENCE)

    def _gather(self, axes: LogicalAxes, x_axes: LogicalAxes) -> jax.Array:
        """Gathers the weight, without its adapter, for activations that are sharded over `x_axes`."""
        return gather_stored(self.partitioner, self.weight, self.scale, axes, x_axes, in_dim=self.in_dims - 1)


def clamped_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Computes `g sigmoid(1.702 g) (u + 1)` with `g` at most 7 and `u` between -7 and 7 (GPT-OSS's published code)."""
    gate = jnp.minimum(gate, 7.0)
    return gate * jax.nn.sigmoid(1.702 * gate) * (jnp.clip(up, -7.0, 7.0) + 1)


def activate(activation: Activation, gate: jax.Array | None, up: jax.Array) -> jax.Array:
    """Returns the hidden features of an MLP; `gate` is None without gating."""
    # GPT-2 and Gemma use the tanh approximation of GELU, JAX's default.
    if gate is None:
        return jax.nn.gelu(up)
    if activation == "clamped_swiglu":
        return clamped_swiglu(gate, up)
    return (jax.nn.gelu(gate) if activation == "geglu" else jax.nn.silu(gate)) * up


class FeedForward(Extensible, ABC):
    """The config of an MLP, or of what takes its place: a frozen dataclass that inherits from this class.

    Arguments `hidden_size` are the width of the residual stream.
    """

    builtins: ClassVar[tuple[str, ...]] = ("jaxinfra.models.layers:MLP", "jaxinfra.models.moe:MixtureOfExperts")

    @abstractmethod
    def build(self, hidden_size: int, out_scale: float, params: ParamFactory) -> Any:
        """Returns the module: `x -> y`, `[B, T, D]`; that of a `MixtureOfExperts` is an `MoE`, with statistics.

        `x` has gathered positions, ("batch", "sequence", None), and `y` those of the residual stream, ("batch",
        "positions", None). `out_scale` is a factor on the initial weights of the last projection.
        """

    @abstractmethod
    def matmul_params(self, hidden_size: int) -> int:
        """Counts the weights in a token's matmuls."""

    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        """Returns sizes and logical axes by field, as `ModelConfig.sharded_dims`."""
        return {}


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForward):
    """The MLP of a layer.

    Attributes:
        dim: hidden width.
        activation: activation and gating: "swiglu" and "geglu" (Shazeer 2020) are `down(act(gate(x)) * up(x))`; "gelu"
            is `down(gelu(up(x)))`; "clamped_swiglu" limits gate and up (see `clamped_swiglu`).
        bias: whether the projections have biases.
    """

    dim: PositiveInt
    activation: Activation = "swiglu"
    bias: bool = False

    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {"dim": (self.dim, "mlp")}

    @override
    def matmul_params(self, hidden_size: int) -> int:
        return hidden_size * self.dim * num_matrices(self.activation)

    @override
    def build(self, hidden_size: int, out_scale: float, params: ParamFactory) -> "MLPModule":
        return MLPModule(self, hidden_size, out_scale, params)


def num_matrices(activation: Activation) -> int:
    """Returns the number of matrices of an MLP: up and down, and a gate unless the activation is "gelu"."""
    return 2 if activation == "gelu" else 3


class MLPModule(nnx.Module):
    """An MLP."""

    def __init__(self, config: MLP, hidden_size: int, out_scale: float, params: ParamFactory):
        linear = partial(Linear, bias=config.bias, params=params)
        column = partial(linear, (hidden_size,), (config.dim,), ("embed", "mlp"), parallelism="column")
        self.activation: Activation = config.activation
        self.gate = None if config.activation == "gelu" else column(tensor="mlp_gate")
        self.up = column(tensor="mlp_up")
        down = partial(linear, (config.dim,), (hidden_size,), ("mlp", "embed"), parallelism="row", tensor="mlp_down")
        self.down = down(scale=out_scale)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Takes gathered positions; returns positions sharded like the residual stream."""
        up_BTF = self.up(x_BTD)
        gate_BTF = None if self.gate is None else self.gate(x_BTD)
        return self.down(activate(self.activation, gate_BTF, up_BTF))


def lookup_embeddings(table_VD: jax.Array, tokens_BT: jax.Array, partitioner: Partitioner) -> jax.Array:
    """Looks up tokens in a stored embedding with the axes `("vocab", "embed")`: `[B, T, D]` in the compute dtype."""
    vocab_axes = partitioner.mesh_axes("vocab")
    if not vocab_axes:
        # Each device looks up its columns for all tokens, then tokens are exchanged: fewer bytes than the table.
        table_VD, out = partitioner.lookup_table(table_VD, "embed")
        tokens_BT = jax.reshard(tokens_BT, P(*out.partitions[:2]))
        return partitioner.reshard_to_tokens(table_VD.at[tokens_BT].get(out_sharding=out), "embed")
    table_VD = partitioner.gather_weight(table_VD, ("vocab", "embed"))

    def lookup_own_rows(table: jax.Array, tokens: jax.Array) -> jax.Array:
        # With rows 0 to 99 on the first device and 100 to 199 on the second, token 120 is row 20 of the second device.
        # The others add zeros.
        row = tokens - jax.lax.axis_index(vocab_axes) * table.shape[0]
        is_own = (row >= 0) & (row < table.shape[0])
        embeddings = jnp.where(is_own[..., None], table[jnp.where(is_own, row, 0)], 0)
        return jax.lax.psum(embeddings, vocab_axes)

    in_specs = tuple(jax.typeof(a).sharding.spec for a in (table_VD, tokens_BT))
    out_specs = partitioner.spec("batch", "sequence", None)
    return jax.shard_map(lookup_own_rows, in_specs=in_specs, out_specs=out_specs)(table_VD, tokens_BT)
