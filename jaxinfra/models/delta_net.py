"""The gated delta net, linear attention with a state of fixed size (Yang et al. 2024; as in Qwen3-Next).

Queries, keys and values go through a short convolution. Queries and keys are divided by their length. Each value head
then applies the gated delta rule (`ops.gated_delta`), with a decay and a rate that depend on the token. Its output is
normalized and multiplied by a gate.

Decoding keeps the state and the last inputs of the convolution, whatever the number of tokens before.

Shape suffixes: B batch, T length, D residual width, G key heads, H value heads, K key head dim, V value head dim,
W width of the convolution, L layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, NamedTuple, override

import jax
import jax.numpy as jnp
from annotated_types import Ge
from flax import nnx
from jax.sharding import PartitionSpec

from jaxinfra.config import Problem
from jaxinfra.config.limits import PositiveInt
from jaxinfra.models.layers import SEQUENCE, Linear, Norm, ParamFactory
from jaxinfra.models.mixer import Mixer, MixerOptions, TokenInfo
from jaxinfra.models.remat import name_tensor
from jaxinfra.ops.gated_delta import Blocks, gated_delta_rule, l2_normalize, short_convolution
from jaxinfra.ops.norm import rms_norm
from jaxinfra.parallel.rules import LogicalAxes
from jaxinfra.parallel.sharding import local_weight
from jaxinfra.parallel.spec import constant, normal


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(Mixer):
    """A gated delta net; defaults are those of Qwen3-Next, in whose published config names begin with `linear_`.

    Attributes:
        num_key_heads: heads of queries and keys.
        num_value_heads: heads of values, gates and states. Consecutive ones share a key head.
        key_head_dim: width of a head of queries and keys.
        value_head_dim: width of a head of values and gates.
        conv_width: positions that the convolution sees, its own included (`linear_conv_kernel_dim`).
    """

    num_key_heads: PositiveInt = 16
    num_value_heads: PositiveInt = 32
    key_head_dim: PositiveInt = 128
    value_head_dim: PositiveInt = 128
    conv_width: Annotated[int, Ge(2)] = 4

    def problems(self) -> Iterable[Problem]:
        """Yields value heads that cannot share the key heads."""
        if self.num_value_heads % self.num_key_heads:
            rounded_up = math.ceil(self.num_value_heads / self.num_key_heads) * self.num_key_heads
            message, fix = "num_key_heads must divide num_value_heads", f"use num_value_heads={rounded_up}"
            yield Problem(fields=("num_value_heads", "num_key_heads"), message=message, fix=fix)

    @override
    def sharded_dims(self) -> Mapping[str, tuple[int, str]]:
        return {"num_key_heads": (self.num_key_heads, "kv_heads"), "num_value_heads": (self.num_value_heads, "heads")}

    @override
    def matmul_params(self, hidden_size: int) -> int:
        key_width, value_width = self.num_key_heads * self.key_head_dim, self.num_value_heads * self.value_head_dim
        # Queries and keys; values, gate and output; rate (beta) and decay, one number a head.
        return hidden_size * (2 * key_width + 3 * value_width + 2 * self.num_value_heads)

    @override
    def pair_features(self, hidden_size: int, length: int) -> float:
        # A token reads the state for its key, writes to it, and reads it for its query.
        return 3 * self.num_value_heads * self.key_head_dim * self.value_head_dim

    @override
    def build(self, options: MixerOptions, params: ParamFactory) -> "GatedDeltaNetModule":
        return GatedDeltaNetModule(self, options, params)


class DeltaCache(NamedTuple):
    """The state after earlier tokens, and the last inputs of the convolutions: for one layer, or `[L, ...]` for all.

    Attributes:
        state: float32 `[B, H, K, V]`.
        query: `[B, W - 1, G, K]`.
        key: `[B, W - 1, G, K]`.
        value: `[B, W - 1, H, V]`.
    """

    state: jax.Array
    query: jax.Array
    key: jax.Array
    value: jax.Array


class _Projected(NamedTuple):
    """The projections of the tokens: `[B, T, heads, features]`, and `[B, T, H]` for decay and beta."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    gate: jax.Array
    decay: jax.Array
    beta: jax.Array


class _Weights(NamedTuple):
    """The weights of a layer that no matmul uses; `a_log` and `dt_bias` make the decay, as in Mamba 2."""

    query_conv: jax.Array
    key_conv: jax.Array
    value_conv: jax.Array
    a_log: jax.Array
    dt_bias: jax.Array
    norm: jax.Array


def _log_uniform(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, out: PartitionSpec | None) -> jax.Array:
    """Initializes with logarithms of uniform values between 0.01 and 16, as Qwen3-Next's published code."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 0.01, 16.0, out_sharding=out)).astype(dtype)


class GatedDeltaNetModule(nnx.Module):
    """A gated delta net over a sequence, or over the tokens that follow a cache."""

    def __init__(self, config: GatedDeltaNet, options: MixerOptions, params: ParamFactory):
        assert options.causal, "a recurrence sees no later position"
        self.config, self.partitioner = config, params.partitioner
        self.key_shape = (config.num_key_heads, config.key_head_dim)
        self.value_shape = (config.num_value_heads, config.value_head_dim)
        hidden, num_heads = (options.hidden_size,), config.num_value_heads
        linear = partial(Linear, bias=False, params=params)
        column = partial(linear, hidden, parallelism="column")
        self.query = column(self.key_shape, ("embed", "kv_heads", None), tensor="query")
        self.key = column(self.key_shape, ("embed", "kv_heads", None), tensor="key")
        self.value = column(self.value_shape, ("embed", "heads", None), tensor="value")
        self.gate = column(self.value_shape, ("embed", "heads", None))
        self.decay = column((num_heads,), ("embed", "heads"))
        self.beta = column((num_heads,), ("embed", "heads"))
        # Without weight decay, as all parameters that no matmul uses.
        width, param = config.conv_width, params.param
        conv = partial(param, init=normal(width**-0.5), role="bias")
        self.query_conv = conv((width, *self.key_shape), (None, "kv_heads", None))
        self.key_conv = conv((width, *self.key_shape), (None, "kv_heads", None))
        self.value_conv = conv((width, *self.value_shape), (None, "heads", None))
        self.a_log = param((num_heads,), ("heads",), _log_uniform, "bias")
        self.dt_bias = param((num_heads,), ("heads",), constant(1.0), "bias")
        # The published weights of this norm are around one, also where those of other norms are around zero.
        self.norm = Norm(config.value_head_dim, replace(options.norm, type="rmsnorm", offset=0.0), params=params)
        out_axes = ("heads", None, "embed")
        out = partial(linear, self.value_shape, hidden, out_axes, parallelism="row", tensor="out_proj")
        self.out = out(scale=options.out_scale)

    def __call__(
        self, x_BTD: jax.Array, tokens: TokenInfo, cache: DeltaCache | None
    ) -> tuple[jax.Array, DeltaCache | None]:
        """Returns the output, sharded like the residual stream `x_BTD`, and the cache with these tokens added."""
        x_BTD = self.partitioner.gather_sequence(x_BTD, "heads")
        projections = (self.query, self.key, self.value, self.gate, self.decay, self.beta)  # the fields in their order
        projected = _Projected(*(project(x_BTD) for project in projections))
        weights = self._weights()
        arrays = (projected, weights, tokens.segments, tokens.counts, cache)
        specs = jax.tree.map(lambda a: jax.typeof(a).sharding.spec, arrays)

        def on_device(
            projected: _Projected,
            weights: _Weights,
            segments_BT: jax.Array | None,
            counts_B: jax.Array | None,
            cache: DeltaCache | None,
        ) -> tuple[jax.Array, DeltaCache | None]:
            weights = _Weights(*map(local_weight, weights, specs[1]))
            blocks = Blocks(sharding=self.partitioner.sequence_sharding, segments_BT=segments_BT)
            return self._mix(projected, weights, blocks, counts_B, cache)

        mapped = jax.shard_map(on_device, in_specs=specs, out_specs=(specs[0].value, specs[4]))
        y_BTHV, cache = mapped(*arrays)
        return self.out(name_tensor(y_BTHV, "attention_out")), cache

    def _weights(self) -> _Weights:
        def gather(param: nnx.Param, axes: LogicalAxes, activation_axes: LogicalAxes = SEQUENCE) -> jax.Array:
            return self.partitioner.gather_weight(param[...], axes, activation_axes, dtype=jnp.dtype("float32"))

        return _Weights(
            query_conv=gather(self.query_conv, (None, "kv_heads", None)),
            key_conv=gather(self.key_conv, (None, "kv_heads", None)),
            value_conv=gather(self.value_conv, (None, "heads", None)),
            a_log=gather(self.a_log, ("heads",)),
            dt_bias=gather(self.dt_bias, ("heads",)),
            norm=gather(self.norm.scale, (None,), (*SEQUENCE, "heads")),
        )

    def _mix(
        self,
        projected: _Projected,
        weights: _Weights,
        blocks: Blocks,
        counts_B: jax.Array | None,
        cache: DeltaCache | None,
    ) -> tuple[jax.Array, DeltaCache | None]:
        """Applies the layer between its projections on a device: `[B, T, H, V]`, and the new cache."""
        before = (None,) * 3 if cache is None else cache[1:]  # the last inputs of the three convolutions

        # Only the projections are saved for the backward pass.
        @jax.checkpoint
        def mix(projected: _Projected, weights: _Weights) -> tuple[jax.Array, jax.Array]:
            q, k, v = (
                short_convolution(x, weight, blocks, x_before)
                for x, weight, x_before in zip(projected[:3], weights[:3], before, strict=True)
            )
            q = l2_normalize(q) * self.config.key_head_dim**-0.5
            step_BTH = jax.nn.softplus(projected.decay.astype(jnp.float32) + weights.dt_bias)
            g_BTH = -jnp.exp(weights.a_log) * step_BTH
            beta_BTH = jax.nn.sigmoid(projected.beta.astype(jnp.float32))
            if counts_B is not None:  # tokens without decay and beta leave the state as it is
                counted_BT1 = (jnp.arange(g_BTH.shape[1]) < counts_B[:, None])[..., None]
                g_BTH, beta_BTH = jnp.where(counted_BT1, g_BTH, 0), jnp.where(counted_BT1, beta_BTH, 0)
            state = None if cache is None else cache.state
            y, state = gated_delta_rule(q, l2_normalize(k), v, g_BTH, beta_BTH, blocks=blocks, state_BHKV=state)
            y = rms_norm(y, weights.norm, eps=self.norm.eps) * jax.nn.silu(projected.gate.astype(jnp.float32))
            return y.astype(projected.value.dtype), state

        y_BTHV, state = mix(projected, weights)
        if cache is None:
            return y_BTHV, None
        assert counts_B is not None
        # The padding of a row comes after its `counts_B` tokens, so these end there, and not at the end of the row.
        last = jax.vmap(partial(jax.lax.dynamic_slice_in_dim, slice_size=self.config.conv_width - 1))
        kept = (
            last(jnp.concatenate([x_before, x], axis=1), counts_B)
            for x, x_before in zip(projected[:3], cache[1:], strict=True)
        )
        return y_BTHV, DeltaCache(state, *kept)

    def empty_cache(self, num_layers: int, batch: int, length: int) -> DeltaCache:
        """Returns a cache of all layers for `batch` rows of any length."""
        spec, dtype = self.partitioner.spec, self.partitioner.compute_dtype
        (key_heads, key_dim), (heads, value_dim) = self.key_shape, self.value_shape
        shape, state_spec = (num_layers, batch, heads, key_dim, value_dim), spec(None, "batch", "heads", None, None)
        state = jnp.zeros(shape, jnp.float32, out_sharding=state_spec)

        def inputs(axis: str, *shape: int) -> jax.Array:
            shape = (num_layers, batch, self.config.conv_width - 1, *shape)
            return jnp.zeros(shape, dtype, out_sharding=spec(None, "batch", None, axis, None))

        keys = inputs("kv_heads", key_heads, key_dim)  # queries have the same shape
        return DeltaCache(state, keys, jnp.zeros_like(keys), inputs("heads", heads, value_dim))
