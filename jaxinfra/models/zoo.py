"""The shapes of published models by name, and two small ones for tests and benchmarks.

Every number is from the `config.json` published with the weights, under the name in the comment of each family. Number
formats, dropout and context lengths belong to the run. Vocabularies are as published, with their padding, so that
parameter counts are exact; a mesh with `tensor` above 1 may need a `vocab_size` that is a multiple of `tensor`.
"""

import difflib
from collections.abc import Mapping
from functools import partial

from jaxinfra.errors import ConfigError
from jaxinfra.models.latent import MLA
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

THETA_1M = Rope(theta=1e6)

# meta-llama/Llama-3.1-{8B,70B,405B} and Llama-3.2-{1B,3B}
_llama3 = partial(TransformerConfig, vocab_size=128256, num_kv_heads=8)
_llama3_1 = partial(_llama3, rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=8.0)))
_llama3_2 = partial(_llama3, rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=32.0)), tie_embeddings=True)

# Qwen/Qwen2.5-{0.5B,...,72B}, the base models; the instruct models of 14B and up have an eps of 1e-6.
_qwen2_5 = partial(TransformerConfig, qkv_bias=True, rope=THETA_1M)
_qwen2_5_small = partial(_qwen2_5, vocab_size=151936, norm_eps=1e-6, tie_embeddings=True)
_qwen2_5_large = partial(_qwen2_5, vocab_size=152064)

# Qwen/Qwen3-{0.6B,...,32B}, Qwen3-30B-A3B and Qwen3-235B-A22B
_qwen3 = partial(TransformerConfig, vocab_size=151936, head_dim=128, norm_eps=1e-6, qk_norm=True, rope=THETA_1M)
_qwen3_dense = partial(_qwen3, num_kv_heads=8)
# All layers have experts, so `mlp_dim`, which is as published, is unused.
_qwen3_experts = partial(MixtureOfExperts, num_experts=128, top_k=8, balance_loss=0.001)

# mistralai/Mistral-7B-v0.1, Mistral-7B-v0.3 and Mixtral-8x7B-v0.1
_mistral = partial(
    TransformerConfig, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, mlp_dim=14336, rope=THETA_1M
)

# Scores are divided by the square root of the width of a head; in the 27B models, of `hidden_size / num_heads`.
_gemma = partial(
    TransformerConfig,
    head_dim=256,
    query_scale=256**-0.5,
    mlp_type="geglu",
    norm_eps=1e-6,
    norm_offset=1.0,
    post_norms=True,
    tie_embeddings=True,
    scale_embeddings=True,
)
# google/gemma-2-{2b,9b,27b}
_gemma2 = partial(
    _gemma,
    vocab_size=256000,
    layer_types=("sliding", "full"),
    sliding_window=4096,
    attn_softcap=50.0,
    rope=Rope(theta=10000.0),
    logit_softcap=30.0,
)
# google/gemma-3-1b-pt
_gemma3_1b = partial(
    _gemma,
    vocab_size=262144,
    qk_norm=True,
    layer_types=("sliding", "sliding", "sliding", "sliding", "sliding", "full"),
    sliding_window=512,
    rope=THETA_1M,
    sliding_rope=Rope(theta=10000.0),
)
# The text part (`text_config`) of google/gemma-3-{4b,12b,27b}-pt
_gemma3 = partial(
    _gemma3_1b, vocab_size=262208, sliding_window=1024, rope=Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
)

# openai-community/gpt2 and gpt2-{medium,large,xl}
_gpt2 = partial(
    TransformerConfig,
    vocab_size=50257,
    mlp_type="gelu",
    norm_type="layernorm",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    rope=None,
    learned_positions=1024,
    tie_embeddings=True,
)

# ViT-{S,B,L}/16 for ImageNet-1k at 224 pixels (Dosovitskiy et al. 2021; S: Touvron et al. 2021)
_vit = partial(VisionTransformerConfig, image_size=224, patch_size=16, num_classes=1000)

SHAPES: dict[str, TransformerConfig] = {
    # Like Llama, for tests and benchmarks; not published.
    "tiny": TransformerConfig(vocab_size=256, num_layers=2, hidden_size=64, num_heads=4, mlp_dim=128),
    "small": TransformerConfig(vocab_size=8192, num_layers=4, hidden_size=256, num_heads=8, mlp_dim=1024),
    "llama-3.1-8b": _llama3_1(num_layers=32, hidden_size=4096, num_heads=32, mlp_dim=14336),
    "llama-3.1-70b": _llama3_1(num_layers=80, hidden_size=8192, num_heads=64, mlp_dim=28672),
    "llama-3.1-405b": _llama3_1(num_layers=126, hidden_size=16384, num_heads=128, mlp_dim=53248),
    "llama-3.2-1b": _llama3_2(num_layers=16, hidden_size=2048, num_heads=32, mlp_dim=8192),
    "llama-3.2-3b": _llama3_2(num_layers=28, hidden_size=3072, num_heads=24, mlp_dim=8192),
    "qwen2.5-0.5b": _qwen2_5_small(num_layers=24, hidden_size=896, num_heads=14, num_kv_heads=2, mlp_dim=4864),
    "qwen2.5-1.5b": _qwen2_5_small(num_layers=28, hidden_size=1536, num_heads=12, num_kv_heads=2, mlp_dim=8960),
    "qwen2.5-3b": _qwen2_5_small(num_layers=36, hidden_size=2048, num_heads=16, num_kv_heads=2, mlp_dim=11008),
    "qwen2.5-7b": _qwen2_5_large(
        num_layers=28, hidden_size=3584, num_heads=28, num_kv_heads=4, mlp_dim=18944, norm_eps=1e-6
    ),
    "qwen2.5-14b": _qwen2_5_large(num_layers=48, hidden_size=5120, num_heads=40, num_kv_heads=8, mlp_dim=13824),
    "qwen2.5-32b": _qwen2_5_large(num_layers=64, hidden_size=5120, num_heads=40, num_kv_heads=8, mlp_dim=27648),
    "qwen2.5-72b": _qwen2_5_large(num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, mlp_dim=29568),
    "qwen3-0.6b": _qwen3_dense(num_layers=28, hidden_size=1024, num_heads=16, mlp_dim=3072, tie_embeddings=True),
    "qwen3-1.7b": _qwen3_dense(num_layers=28, hidden_size=2048, num_heads=16, mlp_dim=6144, tie_embeddings=True),
    "qwen3-4b": _qwen3_dense(num_layers=36, hidden_size=2560, num_heads=32, mlp_dim=9728, tie_embeddings=True),
    "qwen3-8b": _qwen3_dense(num_layers=36, hidden_size=4096, num_heads=32, mlp_dim=12288),
    "qwen3-14b": _qwen3_dense(num_layers=40, hidden_size=5120, num_heads=40, mlp_dim=17408),
    "qwen3-32b": _qwen3_dense(num_layers=64, hidden_size=5120, num_heads=64, mlp_dim=25600),
    "mistral-7b-v0.1": _mistral(
        vocab_size=32000, layer_types=("sliding",), sliding_window=4096, rope=Rope(theta=10000.0)
    ),
    "mistral-7b-v0.3": _mistral(vocab_size=32768),
    "gemma-2-2b": _gemma2(num_layers=26, hidden_size=2304, num_heads=8, num_kv_heads=4, mlp_dim=9216),
    "gemma-2-9b": _gemma2(num_layers=42, hidden_size=3584, num_heads=16, num_kv_heads=8, mlp_dim=14336),
    "gemma-2-27b": _gemma2(
        num_layers=46,
        hidden_size=4608,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=36864,
        query_scale=144**-0.5,
    ),
    "gemma-3-1b": _gemma3_1b(num_layers=26, hidden_size=1152, num_heads=4, num_kv_heads=1, mlp_dim=6912),
    "gemma-3-4b": _gemma3(num_layers=34, hidden_size=2560, num_heads=8, num_kv_heads=4, mlp_dim=10240),
    "gemma-3-12b": _gemma3(num_layers=48, hidden_size=3840, num_heads=16, num_kv_heads=8, mlp_dim=15360),
    "gemma-3-27b": _gemma3(
        num_layers=62,
        hidden_size=5376,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=21504,
        query_scale=168**-0.5,
    ),
    "mixtral-8x7b": _mistral(vocab_size=32000, moe=MixtureOfExperts(num_experts=8, top_k=2, balance_loss=0.02)),
    "qwen3-30b-a3b": _qwen3(
        num_layers=48,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        mlp_dim=6144,
        moe=_qwen3_experts(expert_dim=768),
    ),
    "qwen3-235b-a22b": _qwen3(
        num_layers=94,
        hidden_size=4096,
        num_heads=64,
        num_kv_heads=4,
        mlp_dim=12288,
        moe=_qwen3_experts(expert_dim=1536),
    ),
    # deepseek-ai/DeepSeek-V3-Base, without its multi-token prediction module. Load balancing follows Liu et al. 2024,
    # "DeepSeek-V3 technical report", section 4.2.
    "deepseek-v3": TransformerConfig(
        vocab_size=129280,
        num_layers=58,  # with experts, after 3 dense layers: 61 in all
        num_dense_layers=3,
        hidden_size=7168,
        num_heads=128,
        mlp_dim=18432,
        mla=MLA(kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
        moe=MixtureOfExperts(
            num_experts=256,
            top_k=8,
            expert_dim=2048,
            num_shared_experts=1,
            score_function="sigmoid",
            routed_scaling_factor=2.5,
            num_groups=8,
            top_k_groups=4,
            bias_update_rate=0.001,
            balance_loss=0.0001,
        ),
        norm_eps=1e-6,
        rope=Rope(theta=10000.0, scaling=YarnScaling(factor=40.0, original_length=4096, mscale_all_dim=1.0)),
    ),
    "gpt2": _gpt2(num_layers=12, hidden_size=768, num_heads=12, mlp_dim=3072),
    "gpt2-medium": _gpt2(num_layers=24, hidden_size=1024, num_heads=16, mlp_dim=4096),
    "gpt2-large": _gpt2(num_layers=36, hidden_size=1280, num_heads=20, mlp_dim=5120),
    "gpt2-xl": _gpt2(num_layers=48, hidden_size=1600, num_heads=25, mlp_dim=6400),
}
"""Decoders by name."""

VISION_SHAPES: dict[str, VisionTransformerConfig] = {
    "vit-s16": _vit(num_layers=12, hidden_size=384, num_heads=6, mlp_dim=1536),
    "vit-b16": _vit(num_layers=12, hidden_size=768, num_heads=12, mlp_dim=3072),
    "vit-l16": _vit(num_layers=24, hidden_size=1024, num_heads=16, mlp_dim=4096),
}
"""Image classifiers by name."""


def shape(name: str) -> TransformerConfig:
    """Returns a decoder by name; raises ConfigError for an unknown one. Change fields with `dataclasses.replace`."""
    return _find(name, SHAPES, "shape", "tiny")


def vision_shape(name: str) -> VisionTransformerConfig:
    """Returns an image classifier by name; raises ConfigError for an unknown one."""
    return _find(name, VISION_SHAPES, "vision_shape", "vit-b16")


_OTHER_NAMES = {"gpt2-small": "gpt2", "gpt2-124m": "gpt2", "gpt2-1.5b": "gpt2-xl", "llama3-8b": "llama-3.1-8b"}


def _find[S](name: str, shapes: Mapping[str, S], function: str, example: str) -> S:
    if name not in shapes:
        near = [_OTHER_NAMES[name]] if _OTHER_NAMES.get(name) in shapes else []
        near = near or difflib.get_close_matches(name.lower(), shapes, n=1, cutoff=0.4) or [example]
        raise ConfigError(f'zoo.{function}("{name}"): there is no such model; did you mean "{near[0]}"?')
    return shapes[name]
