"""The shapes of published models by name, and two small ones for tests and benchmarks.

Every number is from the `config.json` published with the weights; the function of a family names its models. Number
formats, dropout and context lengths belong to the run. Vocabularies are as published, with their padding, so that
parameter counts are exact; a mesh with `tensor` above 1 may need a `vocab_size` that it divides.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict, Unpack

from jaxinfra.errors import ConfigError
from jaxinfra.models.latent import MLA
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling


class _Sizes(TypedDict):
    """The sizes in which the models of a family differ."""

    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_dim: int


def _llama(scaling_factor: float, tied: bool, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """meta-llama/Llama-3.1-{8B,70B,405B} and Llama-3.2-{1B,3B}."""
    return TransformerConfig(
        vocab_size=128256,
        num_kv_heads=8,
        rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=scaling_factor)),
        tie_embeddings=tied,
        **sizes,
    )


def _qwen2_5(vocab_size: int, kv_heads: int, eps: float = 1e-6, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """Qwen/Qwen2.5-{0.5B,...,72B}, the base models; the instruct models of 14B and up have an eps of 1e-6."""
    return TransformerConfig(
        vocab_size=vocab_size,
        num_kv_heads=kv_heads,
        norm_eps=eps,
        qkv_bias=True,
        rope=Rope(theta=1e6),
        # Only the models with the smaller vocabulary tie their embeddings.
        tie_embeddings=vocab_size == 151936,
        **sizes,
    )


def _qwen3(
    tied: bool, kv_heads: int = 8, moe: MixtureOfExperts | None = None, **sizes: Unpack[_Sizes]
) -> TransformerConfig:
    """Qwen/Qwen3-{0.6B,...,32B}, Qwen3-30B-A3B and Qwen3-235B-A22B."""
    return TransformerConfig(
        vocab_size=151936,
        num_kv_heads=kv_heads,
        head_dim=128,
        moe=moe,
        norm_eps=1e-6,
        qk_norm=True,
        rope=Rope(theta=1e6),
        tie_embeddings=tied,
        **sizes,
    )


def _mistral(vocab_size: int, theta: float, window: int | None) -> TransformerConfig:
    """mistralai/Mistral-7B-v0.1 and Mistral-7B-v0.3."""
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        layer_types=("full",) if window is None else ("sliding",),
        sliding_window=window,
        rope=Rope(theta=theta),
    )


_gemma = functools.partial(
    TransformerConfig,
    mlp_type="geglu",
    norm_eps=1e-6,
    norm_offset=1.0,
    post_norms=True,
    tie_embeddings=True,
    scale_embeddings=True,
)


def _gemma2(query_scalar: int, kv_heads: int, head_dim: int, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """google/gemma-2-{2b,9b,27b}; queries are scaled by `query_scalar ** -0.5`."""
    return _gemma(
        vocab_size=256000,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layer_types=("sliding", "full"),
        sliding_window=4096,
        attn_softcap=50.0,
        query_scale=query_scalar**-0.5,
        rope=Rope(theta=10000.0),
        logit_softcap=30.0,
        **sizes,
    )


def _gemma3(
    rope: Rope,
    vocab_size: int,
    window: int,
    kv_heads: int,
    head_dim: int = 256,
    query_scalar: int = 256,
    **sizes: Unpack[_Sizes],
) -> TransformerConfig:
    """google/gemma-3-1b-pt and the text part (`text_config`) of gemma-3-{4b,12b,27b}-pt."""
    return _gemma(
        vocab_size=vocab_size,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        sliding_window=window,
        qk_norm=True,
        layer_types=("sliding", "sliding", "sliding", "sliding", "sliding", "full"),
        query_scale=query_scalar**-0.5,
        rope=rope,
        sliding_rope=Rope(theta=10000.0),
        **sizes,
    )


def _deepseek_v3() -> TransformerConfig:
    """deepseek-ai/DeepSeek-V3-Base, without its multi-token prediction module.

    Load balancing follows Liu et al. 2024, "DeepSeek-V3 technical report", section 4.2.
    """
    return TransformerConfig(
        vocab_size=129280,
        num_layers=58,
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
    )


def _gpt2(num_layers: int, hidden_size: int) -> TransformerConfig:
    """openai-community/gpt2 and gpt2-{medium,large,xl}."""
    return TransformerConfig(
        vocab_size=50257,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=hidden_size // 64,
        mlp_dim=4 * hidden_size,
        mlp_type="gelu",
        norm_type="layernorm",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope=None,
        learned_positions=1024,
        tie_embeddings=True,
    )


_PLAIN = Rope(theta=1e6)
_SCALED_8X = Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
_QWEN3_EXPERTS = MixtureOfExperts(num_experts=128, top_k=8, balance_loss=0.001)


def _vit(**sizes: Unpack[_Sizes]) -> VisionTransformerConfig:
    """ViT-{S,B,L}/16 for ImageNet-1k at 224 pixels (Dosovitskiy et al. 2021; S: Touvron et al. 2021)."""
    return VisionTransformerConfig(image_size=224, patch_size=16, num_classes=1000, **sizes)


SHAPES: dict[str, TransformerConfig] = {
    # Like Llama, for tests and benchmarks; not published.
    "tiny": TransformerConfig(vocab_size=256, num_layers=2, hidden_size=64, num_heads=4, mlp_dim=128),
    "small": TransformerConfig(vocab_size=8192, num_layers=4, hidden_size=256, num_heads=8, mlp_dim=1024),
    "llama-3.1-8b": _llama(8.0, False, num_layers=32, hidden_size=4096, num_heads=32, mlp_dim=14336),
    "llama-3.1-70b": _llama(8.0, False, num_layers=80, hidden_size=8192, num_heads=64, mlp_dim=28672),
    "llama-3.1-405b": _llama(8.0, False, num_layers=126, hidden_size=16384, num_heads=128, mlp_dim=53248),
    "llama-3.2-1b": _llama(32.0, True, num_layers=16, hidden_size=2048, num_heads=32, mlp_dim=8192),
    "llama-3.2-3b": _llama(32.0, True, num_layers=28, hidden_size=3072, num_heads=24, mlp_dim=8192),
    "qwen2.5-0.5b": _qwen2_5(151936, 2, num_layers=24, hidden_size=896, num_heads=14, mlp_dim=4864),
    "qwen2.5-1.5b": _qwen2_5(151936, 2, num_layers=28, hidden_size=1536, num_heads=12, mlp_dim=8960),
    "qwen2.5-3b": _qwen2_5(151936, 2, num_layers=36, hidden_size=2048, num_heads=16, mlp_dim=11008),
    "qwen2.5-7b": _qwen2_5(152064, 4, num_layers=28, hidden_size=3584, num_heads=28, mlp_dim=18944),
    "qwen2.5-14b": _qwen2_5(152064, 8, eps=1e-5, num_layers=48, hidden_size=5120, num_heads=40, mlp_dim=13824),
    "qwen2.5-32b": _qwen2_5(152064, 8, eps=1e-5, num_layers=64, hidden_size=5120, num_heads=40, mlp_dim=27648),
    "qwen2.5-72b": _qwen2_5(152064, 8, eps=1e-5, num_layers=80, hidden_size=8192, num_heads=64, mlp_dim=29568),
    "qwen3-0.6b": _qwen3(True, num_layers=28, hidden_size=1024, num_heads=16, mlp_dim=3072),
    "qwen3-1.7b": _qwen3(True, num_layers=28, hidden_size=2048, num_heads=16, mlp_dim=6144),
    "qwen3-4b": _qwen3(True, num_layers=36, hidden_size=2560, num_heads=32, mlp_dim=9728),
    "qwen3-8b": _qwen3(False, num_layers=36, hidden_size=4096, num_heads=32, mlp_dim=12288),
    "qwen3-14b": _qwen3(False, num_layers=40, hidden_size=5120, num_heads=40, mlp_dim=17408),
    "qwen3-32b": _qwen3(False, num_layers=64, hidden_size=5120, num_heads=64, mlp_dim=25600),
    "mistral-7b-v0.1": _mistral(32000, 10000.0, window=4096),
    "mistral-7b-v0.3": _mistral(32768, 1e6, window=None),
    "gemma-2-2b": _gemma2(256, 4, 256, num_layers=26, hidden_size=2304, num_heads=8, mlp_dim=9216),
    "gemma-2-9b": _gemma2(256, 8, 256, num_layers=42, hidden_size=3584, num_heads=16, mlp_dim=14336),
    "gemma-2-27b": _gemma2(144, 16, 128, num_layers=46, hidden_size=4608, num_heads=32, mlp_dim=36864),
    "gemma-3-1b": _gemma3(_PLAIN, 262144, 512, 1, num_layers=26, hidden_size=1152, num_heads=4, mlp_dim=6912),
    "gemma-3-4b": _gemma3(_SCALED_8X, 262208, 1024, 4, num_layers=34, hidden_size=2560, num_heads=8, mlp_dim=10240),
    "gemma-3-12b": _gemma3(_SCALED_8X, 262208, 1024, 8, num_layers=48, hidden_size=3840, num_heads=16, mlp_dim=15360),
    "gemma-3-27b": _gemma3(
        _SCALED_8X,
        262208,
        1024,
        16,
        128,
        query_scalar=168,
        num_layers=62,
        hidden_size=5376,
        num_heads=32,
        mlp_dim=21504,
    ),
    "mixtral-8x7b": TransformerConfig(  # mistralai/Mixtral-8x7B-v0.1
        vocab_size=32000,
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        moe=MixtureOfExperts(num_experts=8, top_k=2, balance_loss=0.02),
        rope=_PLAIN,
    ),
    "qwen3-30b-a3b": _qwen3(
        False, 4, replace(_QWEN3_EXPERTS, expert_dim=768), num_layers=48, hidden_size=2048, num_heads=32, mlp_dim=6144
    ),
    "qwen3-235b-a22b": _qwen3(
        False, 4, replace(_QWEN3_EXPERTS, expert_dim=1536), num_layers=94, hidden_size=4096, num_heads=64, mlp_dim=12288
    ),
    "deepseek-v3": _deepseek_v3(),
    "gpt2": _gpt2(num_layers=12, hidden_size=768),
    "gpt2-medium": _gpt2(num_layers=24, hidden_size=1024),
    "gpt2-large": _gpt2(num_layers=36, hidden_size=1280),
    "gpt2-xl": _gpt2(num_layers=48, hidden_size=1600),
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


def _find[S](name: str, shapes: Mapping[str, S], function: str, example: str) -> S:
    if name not in shapes:
        near = difflib.get_close_matches(name.lower(), shapes, n=1, cutoff=0.4) or [example]
        raise ConfigError(f'zoo.{function}("{name}"): there is no such model; did you mean "{near[0]}"?')
    return shapes[name]
