"""Tiny models of every family, as configs of transformers, with odd shapes.

Widths of heads that are not `hidden_size / heads`, grouped queries, one key head, tied and untied embeddings, windows
shorter than the sequences of 24 tokens, and periods of layers that are cut short.
"""

from typing import Any

from tests.interop import config_keys
from tests.interop.expert_cases import EXPERTS

WINDOW, FULL = "sliding_attention", "full_attention"
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}
ONE_KEY = {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 10}
PLAIN = {"num_attention_heads": 3, "num_key_value_heads": 3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
PHI_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 4.5]}
DOCUMENTS, PROMPTS = (17, 7), (10, 15, 18)
"""Lengths of the documents of a row, and of prompts that are continued to 24 tokens, for an original length of 16."""


def _tiny(model_type: str, tied: bool = False, layers: int = 3, **keys: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": layers}
    others = {"hidden_act": "silu", "tie_word_embeddings": tied, "pad_token_id": None}
    return {"model_type": model_type} | sizes | others | keys


def _gpt2(**keys: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 96, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 32}
    return {"model_type": "gpt2"} | sizes | keys


def _gemma(model_type: str, **keys: Any) -> dict[str, Any]:
    return _tiny(model_type, **{"tied": True, "query_pre_attn_scalar": 7, "sliding_window": 6, **keys})


def _gemma4(**keys: Any) -> dict[str, Any]:
    return _tiny("gemma4_text", **{"tied": True, "sliding_window": 6, "hidden_size_per_layer_input": 0, **keys})


def _phi(**keys: Any) -> dict[str, Any]:
    return _tiny("phi3", **{"num_attention_heads": 4, "num_key_value_heads": 2, **keys})


LLAMA3 = config_keys.LLAMA3 | {"original_max_position_embeddings": 16}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA4_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "position_embedding_size": 8,
}
PIXTRAL = VISION | {"model_type": "pixtral"}

TINY: dict[str, dict[str, Any]] = {
    "llama-grouped": _tiny("llama", rope_theta=500000.0, rope_scaling=LLAMA3, gradients=True, **GROUPED),
    "llama-one-key": _tiny(
        "llama", attention_bias=True, mlp_bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0}, **ONE_KEY
    ),
    "llama-tied": _tiny("llama", tied=True, rms_norm_eps=1e-3, rope_scaling=YARN, **PLAIN),
    "llama-long": _tiny(
        "llama",
        original_max_position_embeddings=24,
        max_position_embeddings=64,
        rope_scaling={"type": "longrope", **PHI_FACTORS},
        **PLAIN | {"num_attention_heads": 4, "num_key_value_heads": 4},
    ),
    "smollm3-grouped": _tiny("smollm3", tied=True, layers=6, **GROUPED),
    "smollm3-window": _tiny(
        "smollm3", layers=5, use_sliding_window=True, sliding_window=7, no_rope_layer_interval=2, **ONE_KEY
    ),
    "smollm3-plain": _tiny("smollm3", no_rope_layers=[0, 1, 1], attention_bias=True, mlp_bias=True, **PLAIN),
    "qwen2-grouped": _tiny("qwen2", rope_theta=1e6, **GROUPED),
    "qwen2-window": _tiny("qwen2", layers=5, use_sliding_window=True, sliding_window=7, max_window_layers=3, **ONE_KEY),
    "qwen2-tied": _tiny("qwen2", tied=True, rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 1.4}, **PLAIN),
    "qwen3-grouped": _tiny("qwen3", rope_theta=1e6, **GROUPED),
    "qwen3-window": _tiny(
        "qwen3", use_sliding_window=True, sliding_window=7, layer_types=[WINDOW, FULL, WINDOW], **ONE_KEY
    ),
    "qwen3-tied": _tiny("qwen3", tied=True, attention_bias=True, **PLAIN, head_dim=16),
    "mistral-grouped": _tiny("mistral", sliding_window=None, **GROUPED),
    "mistral-window": _tiny("mistral", sliding_window=7, rope_theta=1e6, **ONE_KEY),
    "mistral-tied": _tiny("mistral", tied=True, sliding_window=1, **PLAIN),
    "mistral3-text": {
        "model_type": "mistral3",
        "text_config": _tiny("mistral", **GROUPED),
        "vision_config": PIXTRAL,
        "tie_word_embeddings": False,
    },
    "gemma2-grouped": _gemma("gemma2", layers=5, **GROUPED),
    "gemma2-one-key": _gemma("gemma2", attn_logit_softcapping=2.0, final_logit_softcapping=1.0, **ONE_KEY),
    "gemma2-untied": _gemma("gemma2", tied=False, attn_logit_softcapping=None, **PLAIN, head_dim=16),
    "gemma3-grouped": _gemma("gemma3_text", layers=8, gradients=True, **GROUPED),
    "gemma3-one-key": _gemma(
        "gemma3_text",
        rope_theta=1e5,
        rope_local_base_freq=100.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        layer_types=[FULL, WINDOW, WINDOW],
        **ONE_KEY,
    ),
    "gemma3-untied": _gemma("gemma3_text", tied=False, sliding_window_pattern=2, **PLAIN, head_dim=16),
    "gemma3-text": {"model_type": "gemma3", "text_config": _gemma("gemma3_text", **GROUPED), "vision_config": VISION},
    "gemma4-grouped": _gemma4(
        layers=7, attention_k_eq_v=True, num_global_key_value_heads=1, global_head_dim=24, **GROUPED
    ),
    "gemma4-one-key": _gemma4(
        layer_types=[FULL, WINDOW, FULL],
        global_head_dim=14,
        attention_bias=True,
        final_logit_softcapping=5.0,
        rope_parameters={
            FULL: {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.6},
            WINDOW: {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        },
        **ONE_KEY,
    ),
    "gemma4-untied": _gemma4(
        tied=False,
        attention_k_eq_v=True,
        layer_types=[WINDOW, WINDOW, FULL],
        head_dim=16,
        global_head_dim=8,
        rms_norm_eps=1e-3,
        **PLAIN,
    ),
    "gemma4-text": {
        "model_type": "gemma4",
        "text_config": _gemma4(global_head_dim=24, pad_token_id=0, **GROUPED),
        "vision_config": GEMMA4_VISION,
    },
    "gpt2-tied": _gpt2(gradients=True),
    "gpt2-untied": _gpt2(tie_word_embeddings=False, n_inner=50, layer_norm_epsilon=1e-3),
    "gpt2-wide": _gpt2(n_head=1, n_embd=20, activation_function="gelu_pytorch_tanh"),
    "olmo2-grouped": _tiny("olmo2", **GROUPED),
    "olmo2-one-key": _tiny("olmo2", attention_bias=True, rope_theta=500000.0, **ONE_KEY),
    "olmo2-tied": _tiny("olmo2", tied=True, rope_scaling=YARN | {"mscale": 0.4}, **PLAIN),
    "olmo3-grouped": _tiny("olmo3", layers=5, sliding_window=6, gradients=True, **GROUPED),
    "olmo3-one-key": _tiny(
        "olmo3",
        layers=5,
        sliding_window=6,
        rope_theta=500000.0,
        rope_scaling=YARN | {"mscale": 0.7, "attention_factor": 1.3},
        **ONE_KEY,
    ),
    "olmo3-tied": _tiny("olmo3", tied=True, sliding_window=30, layer_types=[FULL, FULL, WINDOW], **PLAIN),
    "phi3-grouped": _phi(),
    "phi3-long": _phi(
        tied=True,
        sliding_window=7,
        original_max_position_embeddings=16,
        max_position_embeddings=64,
        rope_scaling={"type": "longrope", **PHI_FACTORS},
        documents=DOCUMENTS,
        prompts=PROMPTS,
    ),
    "phi3-partial": _phi(partial_rotary_factor=0.5, num_attention_heads=3, num_key_value_heads=1),
    "granite-grouped": _tiny(
        "granite",
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        attention_multiplier=0.1,
        **GROUPED,
    ),
    "granite-one-key": _tiny("granite", attention_bias=True, mlp_bias=True, attention_multiplier=0.3, **ONE_KEY),
    "granite-tied": _tiny("granite", tied=True, logits_scaling=0.5, attention_multiplier=0.25, **PLAIN),
    **EXPERTS,
}
