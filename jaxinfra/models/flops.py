"""Floating-point operations of a transformer, for MFU and plans.

A product of `[m, k]` and `[k, n]` counts `2 m k n`; a training step costs three times its forward pass (Kaplan et
al. 2020, section 2.1; Chowdhery et al. 2022, PaLM, appendix B). Attention counts the pairs of positions that the
mask lets through, so half of the square when causal. Recomputation earns no credit, and norms, rotary positions,
softmax and the embedding lookup count nothing. Of experts those count that a token chooses, dropped or not.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxinfra.models.transformer import TransformerConfig


def matmul_params(config: "TransformerConfig") -> int:
    """Weights that a token is multiplied with: projections, MLP or the experts that it chooses, head, tied or not."""
    inner = config.layers * _inner_params(config) + config.dense_layers * _inner_params(replace(config, experts=None))
    return config.depth * _attention_params(config) + inner + config.width * config.vocab_size


def _attention_params(config: "TransformerConfig") -> int:
    """Weights of the projections of one attention layer; training makes latents into keys and values of every token."""
    width, heads, latent = config.width, config.heads, config.latent
    if latent is None:
        return width * config.head_width * (2 * heads + 2 * config.groups)
    queries = heads * latent.head_dim
    rank = latent.q_rank
    of_queries = width * queries if rank is None else rank * (width + queries)
    of_latent = latent.kv_rank * (width + heads * (latent.nope_dim + latent.value_dim))
    return of_queries + of_latent + width * latent.rope_dim + heads * latent.value_dim * width


def _inner_params(config: "TransformerConfig") -> int:
    """Of one layer's MLP, or of its router, the shared expert and as many others as a token chooses."""
    matrices = 2 if config.mlp == "gelu" else 3
    experts = config.experts
    if experts is None:
        return config.width * config.mlp_dim * matrices
    dim = config.mlp_dim if experts.dim is None else experts.dim
    return config.width * (experts.count + matrices * dim * (experts.chosen + experts.shared))


def visible_keys(length: int, window: int | None) -> float:
    """Keys that a query sees, on average over a causal sequence of `length`, within `window` if there is one."""
    if window is None or window >= length:
        return (length + 1) / 2
    return (window * (window + 1) / 2 + (length - window) * window) / length


def flops_per_token(config: "TransformerConfig", length: int) -> float:
    """FLOPs of forward and backward pass a token, in training on sequences of `length`.

    `6 * matmul_params + 6 * sum over layers of heads * (head_dim + value_dim) * visible keys`: scores and weighted sum
    of values are 2 FLOPs each a feature of a head and visible key, three times for the backward pass.
    """
    windows = (config.window if config.sight(layer) == "local" else None for layer in range(config.depth))
    keys = sum(visible_keys(length, window) for window in windows)
    return 6 * matmul_params(config) + 6 * config.heads * (config.head_width + config.value_width) * keys
