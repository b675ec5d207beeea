"""The shapes of published models by name, and two small ones for tests and benchmarks.

Every number is from the `config.json` published with the weights, under the name in the comment of each family. Number
formats, dropout and context lengths belong to the run. Vocabularies are as published, with their padding, so that
parameter counts are exact; a mesh with `tensor` above 1 may need a `vocab_size` that is a multiple of `tensor`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.models.attention import Attention
from jaxinfra.models.delta_net import GatedDeltaNet
from jaxinfra.models.latent import LatentAttention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import Layer, TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling

THETA_10K, THETA_1M = Rope(theta=10000.0), Rope(theta=1e6)
THETA_1M_BY_8 = Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
MISTRAL_MLP = MLP(dim=14336)


def _alike(
    *, num_layers: int, hidden_size: int, mixer: Attention, mlp: MLP | MixtureOfExperts, **options: Any
) -> TransformerConfig:
    """Returns a decoder whose layers are all the same; `options` are of `TransformerConfig`."""
    layers = (Layer(mixer=mixer, mlp=mlp),)
    return TransformerConfig(num_layers=num_layers, hidden_size=hidden_size, layers=layers, **options)


def _llama3(
    num_layers: int, hidden_size: int, num_heads: int, mlp_dim: int, factor: float = 8.0, **options: Any
) -> TransformerConfig:
    """meta-llama/Llama-3.1-{8B,70B,405B} and Llama-3.2-{1B,3B}."""
    rope = Rope(theta=500000.0, scaling=Llama3Scaling(factor=factor))
    return _alike(
        vocab_size=128256,
        num_layers=num_layers,
        hidden_size=hidden_size,
        mixer=Attention(num_heads=num_heads, num_kv_heads=8, rope=rope),
        mlp=MLP(dim=mlp_dim),
        **options,
    )


_llama3_2 = partial(_llama3, factor=32.0, tie_embeddings=True)


def _qwen2_5(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    eps: float = 1e-5,
    **options: Any,
) -> TransformerConfig:
    """Qwen/Qwen2.5-{0.5B,...,72B}, the base models; the instruct models of 14B and up have an eps of 1e-6."""
    return _alike(
        num_layers=num_layers,
        hidden_size=hidden_size,
        mixer=Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, qkv_bias=True, rope=THETA_1M),
        mlp=MLP(dim=mlp_dim),
        norm=NormConfig(eps=eps),
        **options,
    )


_qwen2_5_small = partial(_qwen2_5, vocab_size=151936, eps=1e-6, tie_embeddings=True)
_qwen2_5_large = partial(_qwen2_5, vocab_size=152064)


def _qwen3(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, mlp: MLP | MixtureOfExperts, **options: Any
) -> TransformerConfig:
    """Qwen/Qwen3-{0.6B,...,32B}, Qwen3-30B-A3B and Qwen3-235B-A22B."""
    return _alike(
        vocab_size=151936,
        num_layers=num_layers,
        hidden_size=hidden_size,
        mixer=Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128, qk_norm="head", rope=THETA_1M),
        mlp=mlp,
        norm=NormConfig(eps=1e-6),
        **options,
    )


def _qwen3_dense(num_layers: int, hidden_size: int, num_heads: int, mlp_dim: int, **options: Any) -> TransformerConfig:
    return _qwen3(num_layers, hidden_size, num_heads, 8, MLP(dim=mlp_dim), **options)


_qwen3_experts = partial(MixtureOfExperts, num_experts=128, top_k=8, balance_loss=0.001)


def _qwen3_next() -> TransformerConfig:
    """Qwen/Qwen3-Next-80B-A3B-Instruct, without its multi-token prediction module: attention in every fourth layer."""
    mlp = _qwen3_experts(dim=512, num_experts=512, top_k=10, num_shared_experts=1, shared_gate=True)
    full = Attention(
        num_heads=16,
        num_kv_heads=2,
        head_dim=256,
        gate=True,
        qk_norm="head",
        rope=Rope(theta=1e7, fraction=0.25),
    )
    return TransformerConfig(
        vocab_size=151936,
        num_layers=48,
        hidden_size=2048,
        layers=(*(Layer(mixer=GatedDeltaNet(), mlp=mlp),) * 3, Layer(mixer=full, mlp=mlp)),
        norm=NormConfig(eps=1e-6, offset=1.0),
    )


def _mistral(
    vocab_size: int, mlp: MLP | MixtureOfExperts = MISTRAL_MLP, rope: Rope = THETA_1M, window: int | None = None
) -> TransformerConfig:
    """mistralai/Mistral-7B-v0.1, Mistral-7B-v0.3 and Mixtral-8x7B-v0.1."""
    mixer = Attention(num_heads=32, num_kv_heads=8, rope=rope, window=window)
    return _alike(vocab_size=vocab_size, num_layers=32, hidden_size=4096, mixer=mixer, mlp=mlp)


def _gemma(
    num_layers: int, hidden_size: int, mlp_dim: int, mixers: Sequence[Attention], **options: Any
) -> TransformerConfig:
    layers = (Layer(mixer=mixer, mlp=MLP(dim=mlp_dim, activation="geglu"), norms="both") for mixer in mixers)
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        layers=tuple(layers),
        norm=NormConfig(eps=1e-6, offset=1.0),
        tie_embeddings=True,
        scale_embeddings=True,
        **options,
    )


def _gemma2(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, mlp_dim: int, head_dim=256, query_dim=256
) -> TransformerConfig:
    """google/gemma-2-{2b,9b,27b}: a sliding window in every other layer.

    Scores are divided by the square root of `query_dim`, in the 27B model of `hidden_size / num_heads`.
    """
    full = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_scale=query_dim**-0.5,
        softcap=50.0,
        rope=THETA_10K,
    )
    mixers = (replace(full, window=4096), full)
    return _gemma(num_layers, hidden_size, mlp_dim, mixers, vocab_size=256000, logit_softcap=30.0)


def _gemma3(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    head_dim: int = 256,
    query_dim: int = 256,
    window: int = 1024,
    vocab_size: int = 262208,
    rope: Rope = THETA_1M_BY_8,
) -> TransformerConfig:
    """google/gemma-3-1b-pt, and the text part (`text_config`) of google/gemma-3-{4b,12b,27b}-pt.

    Five layers of six have a sliding window.
    """
    full = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        query_scale=query_dim**-0.5,
        qk_norm="head",
        rope=rope,
    )
    mixers = (*[replace(full, window=window, rope=THETA_10K)] * 5, full)
    return _gemma(num_layers, hidden_size, mlp_dim, mixers, vocab_size=vocab_size)


def _gpt2(num_layers: int, hidden_size: int, num_heads: int) -> TransformerConfig:
    """openai-community/gpt2 and gpt2-{medium,large,xl}."""
    return _alike(
        vocab_size=50257,
        num_layers=num_layers,
        hidden_size=hidden_size,
        mixer=Attention(num_heads=num_heads, qkv_bias=True, out_bias=True, rope=None),
        mlp=MLP(dim=4 * hidden_size, activation="gelu", bias=True),
        norm=NormConfig(type="layernorm"),
        learned_positions=1024,
        tie_embeddings=True,
    )


def _deepseek_v3() -> TransformerConfig:
    """deepseek-ai/DeepSeek-V3-Base, without its multi-token prediction module.

    Load balancing follows Liu et al. 2024, "DeepSeek-V3 technical report", section 4.2.
    """
    mixer = LatentAttention(
        num_heads=128,
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=Rope(theta=10000.0, scaling=YarnScaling(factor=40.0, original_length=4096, mscale_all_dim=1.0)),
    )
    experts = MixtureOfExperts(
        dim=2048,
        num_experts=256,
        top_k=8,
        num_shared_experts=1,
        score_function="sigmoid",
        routed_scaling_factor=2.5,
        num_groups=8,
        top_k_groups=4,
        bias_update_rate=0.001,
        balance_loss=0.0001,
    )
    return TransformerConfig(
        vocab_size=129280,
        num_layers=61,
        hidden_size=7168,
        first_layers=(Layer(mixer=mixer, mlp=MLP(dim=18432)),) * 3,
        layers=(Layer(mixer=mixer, mlp=experts),),
        norm=NormConfig(eps=1e-6),
    )


# ViT-{S,B,L}/16 for ImageNet-1k at 224 pixels (Dosovitskiy et al. 2021; S: Touvron et al. 2021)
_vit = partial(VisionTransformerConfig, image_size=224, patch_size=16, num_classes=1000)

SHAPES: dict[str, TransformerConfig] = {
    # Like Llama, for tests and benchmarks; not published.
    "tiny": _alike(vocab_size=256, num_layers=2, hidden_size=64, mixer=Attention(num_heads=4), mlp=MLP(dim=128)),
    "small": _alike(vocab_size=8192, num_layers=4, hidden_size=256, mixer=Attention(num_heads=8), mlp=MLP(dim=1024)),
    "llama-3.1-8b": _llama3(num_layers=32, hidden_size=4096, num_heads=32, mlp_dim=14336),
    "llama-3.1-70b": _llama3(num_layers=80, hidden_size=8192, num_heads=64, mlp_dim=28672),
    "llama-3.1-405b": _llama3(num_layers=126, hidden_size=16384, num_heads=128, mlp_dim=53248),
    "llama-3.2-1b": _llama3_2(num_layers=16, hidden_size=2048, num_heads=32, mlp_dim=8192),
    "llama-3.2-3b": _llama3_2(num_layers=28, hidden_size=3072, num_heads=24, mlp_dim=8192),
    "qwen2.5-0.5b": _qwen2_5_small(num_layers=24, hidden_size=896, num_heads=14, num_kv_heads=2, mlp_dim=4864),
    "qwen2.5-1.5b": _qwen2_5_small(num_layers=28, hidden_size=1536, num_heads=12, num_kv_heads=2, mlp_dim=8960),
    "qwen2.5-3b": _qwen2_5_small(num_layers=36, hidden_size=2048, num_heads=16, num_kv_heads=2, mlp_dim=11008),
    "qwen2.5-7b": _qwen2_5_large(
        num_layers=28, hidden_size=3584, num_heads=28, num_kv_heads=4, mlp_dim=18944, eps=1e-6
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
    "mistral-7b-v0.1": _mistral(32000, window=4096, rope=THETA_10K),
    "mistral-7b-v0.3": _mistral(32768),
    "gemma-2-2b": _gemma2(num_layers=26, hidden_size=2304, num_heads=8, num_kv_heads=4, mlp_dim=9216),
    "gemma-2-9b": _gemma2(num_layers=42, hidden_size=3584, num_heads=16, num_kv_heads=8, mlp_dim=14336),
    "gemma-2-27b": _gemma2(
        num_layers=46,
        hidden_size=4608,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=36864,
        query_dim=144,
    ),
    "gemma-3-1b": _gemma3(
        num_layers=26,
        hidden_size=1152,
        num_heads=4,
        num_kv_heads=1,
        mlp_dim=6912,
        window=512,
        vocab_size=262144,
        rope=THETA_1M,
    ),
    "gemma-3-4b": _gemma3(num_layers=34, hidden_size=2560, num_heads=8, num_kv_heads=4, mlp_dim=10240),
    "gemma-3-12b": _gemma3(num_layers=48, hidden_size=3840, num_heads=16, num_kv_heads=8, mlp_dim=15360),
    "gemma-3-27b": _gemma3(
        num_layers=62,
        hidden_size=5376,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        mlp_dim=21504,
        query_dim=168,
    ),
    "mixtral-8x7b": _mistral(32000, MixtureOfExperts(dim=14336, num_experts=8, top_k=2, balance_loss=0.02)),
    "qwen3-30b-a3b": _qwen3(
        num_layers=48,
        hidden_size=2048,
        num_heads=32,
        num_kv_heads=4,
        mlp=_qwen3_experts(dim=768),
    ),
    "qwen3-235b-a22b": _qwen3(
        num_layers=94,
        hidden_size=4096,
        num_heads=64,
        num_kv_heads=4,
        mlp=_qwen3_experts(dim=1536),
    ),
    "qwen3-next-80b-a3b": _qwen3_next(),
    "deepseek-v3": _deepseek_v3(),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
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
