"""The layers of a period of the decoder-only transformer, with their parameters stacked over the periods.

Shape suffixes: B batch, T length, S pipeline stages, D residual width; 1 is a dimension that is broadcast.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.models.layers import RESIDUAL, Norm, ParamFactory
from jaxinfra.models.mixer import MixerOptions, TokenInfo
from jaxinfra.models.module import LayerStats
from jaxinfra.models.moe import MoE
from jaxinfra.models.remat import Remat, name_tensor, remat
from jaxinfra.models.transformer import Layer, Stack, TransformerConfig
from jaxinfra.ops.dropout import dropout, layer_bits
from jaxinfra.ops.rope import Rope
from jaxinfra.parallel.spec import constant

type LayerCache = Any
"""The decoding cache of a layer's mixer, or None."""


class Block(nnx.Module):
    """One layer: mixer and MLP with their norms; their outputs are added to the residual stream.

    The parameters of any mixer are named "attention", as in checkpoints.
    """

    def __init__(self, layer: Layer, config: TransformerConfig, params: ParamFactory):
        self.config, self.partitioner, self.dropout = layer, params.partitioner, config.dropout
        self.rotary = layer.mixer.rotary(config.hidden_size)
        norm = partial(Norm, config.hidden_size, config.norm, params=params)
        # Each layer adds two outputs to the residual stream. As in GPT-2, this scale keeps its variance near one.
        out_scale = (2 * config.num_layers) ** -0.5
        options = MixerOptions(
            hidden_size=config.hidden_size,
            norm=config.norm,
            out_scale=out_scale,
            kernel=config.attention_kernel,
            context_method=config.context_attention,
        )
        before, after = layer.norms in ("before", "both"), layer.norms in ("after", "both")
        self.attention_norm = norm() if before else None
        self.attention = layer.mixer.build(options, params)
        self.attention_post_norm = norm() if after else None
        self.mlp_norm = norm() if before else None
        self.mlp = layer.mlp.build(config.hidden_size, out_scale, params)
        self.mlp_post_norm = norm() if after else None
        self.multiplier = config.residual_multiplier
        scale = partial(params.param, (1,), (None,), constant(1.0), "bias", state="frozen")
        self.output_scale = scale() if layer.output_scale else None

    def __call__(
        self, x_BTD: jax.Array, tokens: TokenInfo, layer_index: jax.Array, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache, LayerStats]:
        """Returns the residual stream after the layer, the cache with these tokens, and the layer's statistics."""
        bits_BT = layer_bits(tokens.dropout_bits, layer_index)
        y_BTD = x_BTD if self.attention_norm is None else self.attention_norm(x_BTD)
        y_BTD, cache = self.attention(y_BTD, tokens, cache)
        if self.attention_post_norm is not None:
            y_BTD = self.attention_post_norm(y_BTD)
        x_BTD += dropout(self._scaled(y_BTD), bits_BT, 0, self.dropout)
        y_BTD = x_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD)
        y_BTD, stats = self.partitioner.gather_sequence(y_BTD, "mlp"), {}
        if isinstance(self.mlp, MoE):
            y_BTD, stats = self.mlp(y_BTD, drop_tokens=cache is None)  # decoding never drops tokens
        else:
            y_BTD = self.mlp(y_BTD)
        if self.mlp_post_norm is not None:
            y_BTD = self.mlp_post_norm(y_BTD)
        x_BTD += dropout(self._scaled(y_BTD), bits_BT, 1, self.dropout)
        if self.output_scale is not None:
            scale_1 = self.partitioner.gather_weight(self.output_scale[...], (None,), RESIDUAL)
            x_BTD = self.partitioner.map_local(jnp.multiply, x_BTD, scale_1)
        return self.partitioner.row_major(x_BTD), cache, stats

    def _scaled(self, y_BTD: jax.Array) -> jax.Array:
        """Multiplies what is added to the residual stream; most models add it as it is."""
        return y_BTD if self.multiplier == 1 else y_BTD * self.multiplier


class Period(nnx.Module):
    """The layers of a period of several, as the attributes `layer_0`, `layer_1` and so on."""

    def __init__(self, blocks: Sequence[Block]):
        for name, block in zip(layer_names(len(blocks)), blocks, strict=True):
            setattr(self, name, block)


def layer_names(count: int) -> tuple[str, ...]:
    """Returns the names of the layers of a period in parameters and statistics; that of a single layer is empty."""
    return ("",) if count == 1 else tuple(f"layer_{position}" for position in range(count))


def build_period(stack: Stack, config: TransformerConfig, params: ParamFactory) -> Block | Period:
    """Builds one period, whose parameters are those of all periods, stacked."""
    params = replace(params, num_layers=stack.times)
    blocks = [Block(layer, config, params) for layer in stack.layers]
    return blocks[0] if len(blocks) == 1 else Period(blocks)


def layers_of(period: Block | Period, stack: Stack) -> list[Block]:
    """Returns the layers of a period."""
    return [period] if isinstance(period, Block) else [getattr(period, name) for name in layer_names(len(stack.layers))]


def prefixed(stats: LayerStats, *prefix: str) -> LayerStats:
    """Puts the path of a layer before the names of its statistics: `layer_1.expert_load`."""
    return {".".join(filter(None, (*prefix, name))): array for name, array in stats.items()}


@dataclass(frozen=True, kw_only=True)
class PeriodContext:
    """Applies the layers of a period.

    Attributes:
        stack: the configs of the layers.
        tokens: the tokens, without rotary positions.
        tables: `TokenInfo.rope` for each value of `Mixer.rotary` in the period.
        policies: a remat policy for each layer of the period; () for no rematerialization.
        alone: whether the scan is a loop whose step applies one layer only (see `models.remat.remat`).
    """

    stack: Stack
    tokens: TokenInfo
    tables: Mapping[tuple[Rope, int] | None, Any]
    policies: tuple[Remat, ...] = ()
    alone: bool = True

    def apply(
        self, period: Block | Period, x_BTD: jax.Array, index: jax.Array, caches: Sequence[LayerCache] = ()
    ) -> tuple[jax.Array, tuple[LayerCache, ...], LayerStats]:
        """Applies a period; `index` is its number in the stack, or `[S]` numbers if S stages apply different periods.

        Returns the activations, the new caches and the statistics.
        """
        count, new_caches, all_stats = len(self.stack.layers), [], {}
        first = self.stack.first + count * index  # index of the first layer of the period in the model
        for position, (name, block) in enumerate(zip(layer_names(count), layers_of(period, self.stack), strict=True)):
            layer = remat(self._layer, self.policies[position] if self.policies else "none", alone=self.alone)
            x_BTD, cache, stats = layer(block, x_BTD, first + position, caches[position] if caches else None)
            new_caches.append(cache)
            all_stats |= prefixed(stats, name)
        return x_BTD, tuple(new_caches), all_stats

    def _layer(
        self, block: Block, x_BTD: jax.Array, index: jax.Array, cache: LayerCache
    ) -> tuple[jax.Array, LayerCache, LayerStats]:
        tokens = self.tokens._replace(rope=self.tables[block.rotary])
        return block(name_tensor(x_BTD, "layer_input"), tokens, index, cache)
