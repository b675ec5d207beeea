"""Floating-point operations of a transformer, for MFU and plans.

A matmul of `[m, k]` and `[k, n]` counts `2 m k n`, and a training step three times its forward pass (Kaplan et al.
2020, section 2.1; Chowdhery et al. 2022, PaLM, appendix B). Attention counts only pairs of positions inside the mask,
about half of all pairs if causal. Rematerialization, norms, rotary positions, softmax and the embedding lookup are not
counted. A token counts the experts that it chooses, even if the choice is dropped.
"""

from dataclasses import replace

from jaxinfra.models.transformer import TransformerConfig


def matmul_params(config: TransformerConfig) -> int:
    """Counts the weights in a token's matmuls: projections, MLP or chosen experts, and LM head."""
    attention = config.total_layers * _attention_params(config)
    mlp = config.num_layers * _mlp_params(config) + config.num_dense_layers * _mlp_params(replace(config, moe=None))
    return attention + mlp + config.hidden_size * config.vocab_size


def _attention_params(config: TransformerConfig) -> int:
    hidden, heads, mla = config.hidden_size, config.num_heads, config.mla
    if mla is None:  # queries and output have all heads, keys and values only `kv_head_count`
        return hidden * config.qk_head_dim * (2 * heads + 2 * config.kv_head_count)
    all_queries, q_rank, kv_rank = heads * mla.qk_head_dim, mla.q_lora_rank, mla.kv_lora_rank
    query = hidden * all_queries if q_rank is None else q_rank * (hidden + all_queries)
    key_value = kv_rank * (hidden + heads * (mla.qk_nope_head_dim + mla.v_head_dim))
    rotated_key = hidden * mla.qk_rope_head_dim
    out = heads * mla.v_head_dim * hidden
    return query + key_value + rotated_key + out


def _mlp_params(config: TransformerConfig) -> int:
    """Counts the weights of one MLP, or of a router and the experts that process a token."""
    matrices = 2 if config.mlp_type == "gelu" else 3
    moe = config.moe
    if moe is None:
        return config.hidden_size * config.mlp_dim * matrices
    expert_dim = config.mlp_dim if moe.expert_dim is None else moe.expert_dim
    return config.hidden_size * (moe.num_experts + matrices * expert_dim * (moe.top_k + moe.num_shared_experts))


def visible_keys(length: int, window: int | None) -> float:
    """Returns the mean number of keys that a query attends to, in a causal sequence with an optional window."""
    window = length if window is None else min(window, length)
    # The first `window` queries attend to 1, 2, ..., window keys, all others to `window`.
    return (window * (window + 1) / 2 + (length - window) * window) / length


def flops_per_token(config: TransformerConfig, length: int) -> float:
    """Returns the training FLOPs of one token, in sequences of `length`.

    A weight costs 2 FLOPs, three times as many with the backward pass. So do a feature of a query and of an attention
    output for each visible key.
    """
    specs = [config.attention_spec(config.layer_type(layer)) for layer in range(config.total_layers)]
    keys = sum(visible_keys(length, spec.window) for spec in specs)
    return 6 * matmul_params(config) + 6 * config.num_heads * (config.qk_head_dim + config.v_head_dim) * keys
