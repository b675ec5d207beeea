"""Floating-point operations of a transformer, for MFU and plans.

A matmul of `[m, k]` and `[k, n]` counts `2 m k n`, and a training step three times its forward pass (Kaplan et al.
2020, section 2.1; Chowdhery et al. 2022, PaLM, appendix B). Attention counts only pairs of positions inside the mask,
about half of all pairs if causal. A gated delta net counts what its recurrence multiplies, token by token.
Rematerialization, norms, rotary positions, softmax, convolutions and the embedding lookup are not counted. A token
counts the experts that it chooses, even if the choice is dropped.
"""

from collections.abc import Mapping

from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.parallel.spec import ParamSpec


def matmul_params(config: TransformerConfig) -> int:
    """Counts the weights in a token's matmuls: projections, MLP or chosen experts, and LM head."""
    hidden = config.hidden_size
    layers = sum(each.mixer.matmul_params(hidden) + each.mlp.matmul_params(hidden) for each in config.training_layers)
    # A module for multi-token prediction also joins two inputs, and applies the head once more.
    return layers + hidden * (config.vocab_size + config.mtp_depths * (2 * hidden + config.vocab_size))


def flops_per_token(config: TransformerConfig, length: int) -> float:
    """Returns the training FLOPs of one token, in sequences of `length`.

    A weight costs 2 FLOPs, and three times as many with the backward pass: 6. So do a feature of a query or of an
    attention output for each visible key, and a multiplication with a recurrent state (`Mixer.pair_features`).
    """
    pairs = sum(layer.mixer.pair_features(config.hidden_size, length) for layer in config.training_layers)
    return 6 * matmul_params(config) + 6 * pairs


def change_per_token(config: TransformerConfig, specs: Mapping[str, ParamSpec], base: Mapping[str, ParamSpec]) -> float:
    """Returns the FLOPs of one token beyond `flops_per_token`, for a run with adapters or frozen weights.

    A frozen weight has no gradient, which saves 2; a parameter of an adapter costs 6 (see `Module.flops_of_changes`).
    """
    experts = [layer.mlp for layer in config.all_layers if isinstance(layer.mlp, MixtureOfExperts)]
    active = experts[0].top_k / experts[0].num_experts if experts else 1.0

    def used(spec: ParamSpec) -> float:
        is_matmul = spec.in_dims or (spec.role == "embedding" and config.tie_embeddings)
        return spec.size * (active if "experts" in spec.axes else 1.0) if is_matmul else 0.0

    frozen = sum(used(spec) for path, spec in base.items() if specs[path].state == "frozen")
    adapters = sum(used(spec) for path, spec in specs.items() if path not in base and spec.state == "trained")
    return 6 * adapters - 2 * frozen
