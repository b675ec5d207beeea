"""Modules for multi-token prediction beside a decoder (DeepSeek-AI 2024, "DeepSeek-V3", section 2.2).

Shape suffixes: B batch, T length, D residual width.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfra.models.layers import Linear, Norm, ParamFactory
from jaxinfra.models.period import Block
from jaxinfra.models.transformer import Stack, TransformerConfig


class MtpModule(nnx.Module):
    """A module for multi-token prediction; with several, their parameters are stacked."""

    def __init__(self, stack: Stack, config: TransformerConfig, params: ParamFactory):
        params, hidden = replace(params, num_layers=stack.times), config.hidden_size
        norm = partial(Norm, hidden, config.norm, params=params)
        self.embedding_norm, self.hidden_norm, self.norm = norm(), norm(), norm()
        axes = ("embed", None)
        self.join = Linear((2 * hidden,), (hidden,), axes, parallelism="sequence", bias=False, params=params)
        self.block = Block(stack.layers[0], config, params)

    def joined(self, embedding_BTD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the input of the layer; the embedding comes first, as in all published weights."""
        parts = [self.embedding_norm(embedding_BTD), self.hidden_norm(hidden_BTD)]
        return self.join(jnp.concatenate(parts, axis=-1))
