"""Tiny models of the families with experts, in odd shapes: keys of transformers' configs.

Sequences have 24 tokens, more than any window or chunk.
"""

from typing import Any

from tests.interop.config_keys import LLAMA3, sizes

YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}

_MIXTRAL = sizes(vocab=97, hidden=48, mlp=40, layers=2, heads=6, key_heads=2) | {
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
}

_QWEN3_MOE = sizes(vocab=61, hidden=40, mlp=72, layers=3, heads=6, key_heads=3) | {
    "moe_intermediate_size": 24,
    "head_dim": 10,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
}

_DEEPSEEK = sizes(vocab=83, hidden=36, mlp=56, layers=3, heads=3, key_heads=3) | {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 14,
    "q_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}

_GPT_OSS = sizes(vocab=101, hidden=48, mlp=40, layers=3, heads=6, key_heads=2) | {
    "head_dim": 10,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "rope_parameters": YARN | {"truncate": False},
}

_LLAMA4 = sizes(vocab=73, hidden=48, mlp=40, layers=5, heads=6, key_heads=2) | {
    "intermediate_size_mlp": 56,
    "head_dim": 12,
    "num_local_experts": 4,
    "attention_chunk_size": 7,
    "floor_scale": 5,
    "attn_scale": 0.3,
}

_VISION = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}

_GLM4_MOE = sizes(vocab=89, hidden=40, mlp=64, layers=3, heads=6, key_heads=2) | {
    "moe_intermediate_size": 24,
    "head_dim": 12,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "use_qk_norm": True,
}

_QWEN3_NEXT = sizes(vocab=71, hidden=40, mlp=64, layers=4, heads=6, key_heads=2) | {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "head_dim": 16,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}

_QWEN3_5_MOE = {name: value for name, value in _QWEN3_NEXT.items() if name != "intermediate_size"}
_QWEN3_5 = {name: value for name, value in _QWEN3_NEXT.items() if "expert" not in name and "moe" not in name}
_QWEN3_5_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 40}

_CASES: dict[str, list[dict[str, Any]]] = {
    "mixtral": [
        _MIXTRAL,
        _MIXTRAL | {"head_dim": 12, "num_key_value_heads": 6, "sliding_window": 7, "tie_word_embeddings": True},
        _MIXTRAL | {"num_hidden_layers": 1, "num_key_value_heads": 1, "num_experts_per_tok": 1, "rms_norm_eps": 1e-3},
    ],
    "qwen3_moe": [
        _QWEN3_MOE,
        _QWEN3_MOE | {"mlp_only_layers": [0], "norm_topk_prob": False, "attention_bias": True},
        _QWEN3_MOE
        | {
            "decoder_sparse_step": 2,
            "num_hidden_layers": 5,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ],
    "deepseek_v3": [
        _DEEPSEEK,
        _DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True}
        | {"rope_parameters": YARN | {"mscale_all_dim": 0.7}},
        _DEEPSEEK
        | {
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ],
    "gpt_oss": [
        _GPT_OSS,
        _GPT_OSS | {"num_hidden_layers": 2, "num_key_value_heads": 6, "head_dim": 8, "tie_word_embeddings": True},
        _GPT_OSS
        | {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attention_bias": False,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ],
    "llama4_text": [
        _LLAMA4,
        _LLAMA4 | {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_hidden_layers": 4},
        _LLAMA4
        | {
            "num_experts_per_tok": 2,
            "no_rope_layers": [1, 0, 1, 1, 0],
            "moe_layers": [1, 2],
            "attn_temperature_tuning": False,
            "attention_chunk_size": None,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3
            | {"rope_theta": 500.0, "high_freq_factor": 1.0, "original_max_position_embeddings": 16},
        },
    ],
    "qwen3_next": [
        _QWEN3_NEXT,
        _QWEN3_NEXT
        | {"full_attention_interval": 2, "linear_num_value_heads": 3, "norm_topk_prob": False, "attention_bias": True},
        _QWEN3_NEXT
        | {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "mlp_only_layers": [1],
            "shared_expert_intermediate_size": 48,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ],
    "qwen3_5_text": [
        _QWEN3_5,
        _QWEN3_5
        | {
            "num_hidden_layers": 5,
            "num_key_value_heads": 6,
            "full_attention_interval": 2,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [1, 1, 0]},
            "tie_word_embeddings": True,
        },
        _QWEN3_5
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_value_head_dim": 7,
            "linear_conv_kernel_dim": 3,
            "rms_norm_eps": 1e-3,
        },
    ],
    "qwen3_5_moe_text": [
        _QWEN3_5_MOE,
        _QWEN3_5_MOE
        | {"full_attention_interval": 2, "linear_num_value_heads": 3, "num_experts_per_tok": 1, "attention_bias": True},
        _QWEN3_5_MOE
        | {
            "num_hidden_layers": 3,
            "num_key_value_heads": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "shared_expert_intermediate_size": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
            "tie_word_embeddings": True,
        },
    ],
    "glm4_moe": [
        _GLM4_MOE,
        _GLM4_MOE | {"num_hidden_layers": 4, "first_k_dense_replace": 2, "use_qk_norm": False, "head_dim": 8},
        _GLM4_MOE
        | {
            "n_group": 3,
            "topk_group": 2,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "attention_bias": False,
            "first_k_dense_replace": 0,
            "tie_word_embeddings": True,
        },
    ],
}

EXPERTS: dict[str, dict[str, Any]] = {
    f"{model_type}-{index}": {"model_type": model_type, **keys}
    for model_type, cases in _CASES.items()
    for index, keys in enumerate(cases)
}
EXPERTS["qwen3_moe-0"]["gradients"] = EXPERTS["gpt_oss-0"]["gradients"] = True
EXPERTS["llama4-text"] = {"model_type": "llama4", "text_config": _LLAMA4, "vision_config": _VISION}
EXPERTS["qwen3_5-text"] = {"model_type": "qwen3_5", "text_config": _QWEN3_5, "vision_config": _QWEN3_5_VISION}
EXPERTS["qwen3_5_moe-text"] = {
    "model_type": "qwen3_5_moe",
    "text_config": _QWEN3_5_MOE,
    "vision_config": _QWEN3_5_VISION,
}
"""Three models of each family, and the text part of those with images."""
