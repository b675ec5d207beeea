"""Floating-point operations of a transformer, for MFU and plans.

A matmul of `[m, k]` and `[k, n]` counts `2 m k n`, and a training step three times its forward pass (Kaplan et al.
2020, section 2.1; Chowdhery et al. 2022, PaLM, appendix B). Attention counts only pairs of positions inside the mask,
about half of all pairs if causal. A gated delta net counts what its recurrence multiplies, token by token.
Rematerialization, norms, rotary positions, softmax, convolutions and the embedding lookup are not counted. A token
counts the experts that it chooses, even if the choice is dropped.
"""

from jaxinfra.models.transformer import TransformerConfig


def matmul_params(config: TransformerConfig) -> int:
    """Counts the weights in a token's matmuls: projections, MLP or chosen experts, and LM head."""
    hidden = config.hidden_size
    layers = sum(each.mixer.matmul_params(hidden) + each.mlp.matmul_params(hidden) for each in config.all_layers)
    return layers + hidden * config.vocab_size


def flops_per_token(config: TransformerConfig, length: int) -> float:
    """Returns the training FLOPs of one token, in sequences of `length`.

    A weight costs 2 FLOPs, and three times as many with the backward pass: 6. So do a feature of a query or of an
    attention output for each visible key, and a multiplication with a recurrent state (`Mixer.pair_features`).
    """
    pairs = sum(layer.mixer.pair_features(config.hidden_size, length) for layer in config.all_layers)
    return 6 * matmul_params(config) + 6 * pairs
