"""Floating-point operations of a transformer, for MFU and plans.

A matmul of `[m, k]` and `[k, n]` counts `2 m k n`, and a training step three times its forward pass (Kaplan et al.
2020, section 2.1; Chowdhery et al. 2022, PaLM, appendix B). Attention counts only pairs of positions inside the mask,
about half of all pairs if causal. Rematerialization, norms, rotary positions, softmax and the embedding lookup are not
counted. A token counts the experts that it chooses, even if the choice is dropped.
"""

from jaxinfra.models.mixer import Mixer
from jaxinfra.models.transformer import TransformerConfig


def matmul_params(config: TransformerConfig) -> int:
    """Counts the weights in a token's matmuls: projections, MLP or chosen experts, and LM head."""
    hidden = config.hidden_size
    layers = sum(each.mixer.matmul_params(hidden) + each.mlp.matmul_params(hidden) for each in config.all_layers)
    return layers + hidden * config.vocab_size


def flops_per_token(config: TransformerConfig, length: int) -> float:
    """Returns the training FLOPs of one token, in sequences of `length`.

    A weight costs 2 FLOPs, three times as many with the backward pass. So do a feature of a query and of an attention
    output for each visible key.
    """
    pairs = sum(_pair_features(layer.mixer, config.hidden_size, length) for layer in config.all_layers)
    return 6 * matmul_params(config) + 6 * pairs


def _pair_features(mixer: Mixer, hidden_size: int, length: int) -> float:
    """Counts the features of queries and outputs of a token, once for each visible key."""
    attention = mixer.attention(hidden_size)
    if attention is None:
        return 0
    _, heads = attention
    return heads.num_heads * (heads.head_dim + heads.value_dim) * mixer.visible_keys(hidden_size, length)
