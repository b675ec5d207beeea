"""Published models by name, and two small ones for tests and benchmarks.

Every number is from the `config.json` published with the weights of the models that a family's
function names. A shape is all there is: number formats, dropout and context lengths are the run's business.
Vocabularies are as published, padding included, so that parameter counts are exact; a mesh with `tensor`
above 1 may want a `vocab_size` that it divides.
"""

import difflib
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TypedDict, Unpack

from jaxinfra.errors import ConfigError
from jaxinfra.models.latent import Latent
from jaxinfra.models.moe import Experts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.models.vit import VisionTransformerConfig
from jaxinfra.ops.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling


class _Sizes(TypedDict):
    """What differs between the models of every family."""

    layers: int
    width: int
    heads: int
    mlp_dim: int


def _llama(scaling_factor: float, tied: bool, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """meta-llama/Llama-3.1-{8B,70B,405B} and Llama-3.2-{1B,3B}."""
    return TransformerConfig(
        vocab_size=128256,
        kv_heads=8,
        rope=Rope(theta=500000.0, scaling=Llama3Scaling(factor=scaling_factor)),
        tied=tied,
        **sizes,
    )


def _qwen2_5(vocab_size: int, kv_heads: int, eps: float = 1e-6, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """Qwen/Qwen2.5-{0.5B,...,72B}, the base models; the instructed ones of 14B and up have an eps of 1e-6."""
    return TransformerConfig(
        vocab_size=vocab_size,
        kv_heads=kv_heads,
        norm_eps=eps,
        qkv_bias=True,
        rope=Rope(theta=1e6),
        # The smaller vocabulary is that of the models that tie it.
        tied=vocab_size == 151936,
        **sizes,
    )


def _qwen3(tied: bool, kv_heads: int = 8, experts: Experts | None = None, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """Qwen/Qwen3-{0.6B,...,32B}, Qwen3-30B-A3B and Qwen3-235B-A22B."""
    return TransformerConfig(
        vocab_size=151936,
        kv_heads=kv_heads,
        head_dim=128,
        experts=experts,
        norm_eps=1e-6,
        qk_norm=True,
        rope=Rope(theta=1e6),
        tied=tied,
        **sizes,
    )


def _mistral(vocab_size: int, theta: float, window: int | None) -> TransformerConfig:
    """mistralai/Mistral-7B-v0.1 and Mistral-7B-v0.3."""
    return TransformerConfig(
        vocab_size=vocab_size,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        mlp_dim=14336,
        sights=("global",) if window is None else ("local",),
        window=window,
        rope=Rope(theta=theta),
    )


_gemma = functools.partial(
    TransformerConfig,
    mlp="geglu",
    norm_eps=1e-6,
    norm_offset=1.0,
    post_norms=True,
    tied=True,
    scale_embeddings=True,
)


def _gemma2(query_scalar: int, kv_heads: int, head_dim: int, **sizes: Unpack[_Sizes]) -> TransformerConfig:
    """google/gemma-2-{2b,9b,27b}; queries are scaled by `query_scalar ** -0.5`."""
    return _gemma(
        vocab_size=256000,
        kv_heads=kv_heads,
        head_dim=head_dim,
        sights=("local", "global"),
        window=4096,
        softcap=50.0,
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
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        qk_norm=True,
        sights=("local", "local", "local", "local", "local", "global"),
        query_scale=query_scalar**-0.5,
        rope=rope,
        local_rope=Rope(theta=10000.0),
        **sizes,
    )


def _deepseek_v3() -> TransformerConfig:
    """deepseek-ai/DeepSeek-V3-Base, without its module that predicts a second token; balanced as in its report.

    Liu et al. 2024, "DeepSeek-V3 technical report", section 4.2: biases move by 0.001 a step, the sequence-wise loss
    weighs 0.0001. Its three dense layers come on top of `layers`.
    """
    return TransformerConfig(
        vocab_size=129280,
        layers=58,
        dense_layers=3,
        width=7168,
        heads=128,
        mlp_dim=18432,
        latent=Latent(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
        experts=Experts(
            count=256,
            chosen=8,
            dim=2048,
            shared=1,
            score="sigmoid",
            scale=2.5,
            groups=8,
            chosen_groups=4,
            bias_rate=0.001,
            balance_loss=0.0001,
        ),
        norm_eps=1e-6,
        rope=Rope(theta=10000.0, scaling=YarnScaling(factor=40.0, original_length=4096, mscale_all_dim=1.0)),
    )


def _gpt2(layers: int, width: int) -> TransformerConfig:
    """openai-community/gpt2, gpt2-{medium,large,xl}: heads of 64, an MLP of four times the width."""
    return TransformerConfig(
        vocab_size=50257,
        layers=layers,
        width=width,
        heads=width // 64,
        mlp_dim=4 * width,
        mlp="gelu",
        norm="layernorm",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope=None,
        learned_positions=1024,
        tied=True,
    )


_PLAIN = Rope(theta=1e6)
_STRETCHED = Rope(theta=1e6, scaling=LinearScaling(factor=8.0))
_QWEN3_EXPERTS = Experts(count=128, chosen=8, balance_loss=0.001)


def _vit(**sizes: Unpack[_Sizes]) -> VisionTransformerConfig:
    """ViT-{S,B,L}/16 for ImageNet-1k at 224 pixels (Dosovitskiy et al. 2021; S: Touvron et al. 2021)."""
    return VisionTransformerConfig(image_size=224, patch=16, classes=1000, **sizes)


SHAPES: dict[str, TransformerConfig] = {
    # Llama-like, for tests and benchmarks; published nowhere.
    "tiny": TransformerConfig(vocab_size=256, layers=2, width=64, heads=4, mlp_dim=128),
    "small": TransformerConfig(vocab_size=8192, layers=4, width=256, heads=8, mlp_dim=1024),
    "llama-3.1-8b": _llama(8.0, False, layers=32, width=4096, heads=32, mlp_dim=14336),
    "llama-3.1-70b": _llama(8.0, False, layers=80, width=8192, heads=64, mlp_dim=28672),
    "llama-3.1-405b": _llama(8.0, False, layers=126, width=16384, heads=128, mlp_dim=53248),
    "llama-3.2-1b": _llama(32.0, True, layers=16, width=2048, heads=32, mlp_dim=8192),
    "llama-3.2-3b": _llama(32.0, True, layers=28, width=3072, heads=24, mlp_dim=8192),
    "qwen2.5-0.5b": _qwen2_5(151936, 2, layers=24, width=896, heads=14, mlp_dim=4864),
    "qwen2.5-1.5b": _qwen2_5(151936, 2, layers=28, width=1536, heads=12, mlp_dim=8960),
    "qwen2.5-3b": _qwen2_5(151936, 2, layers=36, width=2048, heads=16, mlp_dim=11008),
    "qwen2.5-7b": _qwen2_5(152064, 4, layers=28, width=3584, heads=28, mlp_dim=18944),
    "qwen2.5-14b": _qwen2_5(152064, 8, eps=1e-5, layers=48, width=5120, heads=40, mlp_dim=13824),
    "qwen2.5-32b": _qwen2_5(152064, 8, eps=1e-5, layers=64, width=5120, heads=40, mlp_dim=27648),
    "qwen2.5-72b": _qwen2_5(152064, 8, eps=1e-5, layers=80, width=8192, heads=64, mlp_dim=29568),
    "qwen3-0.6b": _qwen3(True, layers=28, width=1024, heads=16, mlp_dim=3072),
    "qwen3-1.7b": _qwen3(True, layers=28, width=2048, heads=16, mlp_dim=6144),
    "qwen3-4b": _qwen3(True, layers=36, width=2560, heads=32, mlp_dim=9728),
    "qwen3-8b": _qwen3(False, layers=36, width=4096, heads=32, mlp_dim=12288),
    "qwen3-14b": _qwen3(False, layers=40, width=5120, heads=40, mlp_dim=17408),
    "qwen3-32b": _qwen3(False, layers=64, width=5120, heads=64, mlp_dim=25600),
    "mistral-7b-v0.1": _mistral(32000, 10000.0, window=4096),
    "mistral-7b-v0.3": _mistral(32768, 1e6, window=None),
    "gemma-2-2b": _gemma2(256, 4, 256, layers=26, width=2304, heads=8, mlp_dim=9216),
    "gemma-2-9b": _gemma2(256, 8, 256, layers=42, width=3584, heads=16, mlp_dim=14336),
    "gemma-2-27b": _gemma2(144, 16, 128, layers=46, width=4608, heads=32, mlp_dim=36864),
    "gemma-3-1b": _gemma3(_PLAIN, 262144, 512, 1, layers=26, width=1152, heads=4, mlp_dim=6912),
    "gemma-3-4b": _gemma3(_STRETCHED, 262208, 1024, 4, layers=34, width=2560, heads=8, mlp_dim=10240),
    "gemma-3-12b": _gemma3(_STRETCHED, 262208, 1024, 8, layers=48, width=3840, heads=16, mlp_dim=15360),
    "gemma-3-27b": _gemma3(
        _STRETCHED, 262208, 1024, 16, 128, query_scalar=168, layers=62, width=5376, heads=32, mlp_dim=21504
    ),
    "mixtral-8x7b": TransformerConfig(  # mistralai/Mixtral-8x7B-v0.1
        vocab_size=32000,
        layers=32,
        width=4096,
        heads=32,
        kv_heads=8,
        mlp_dim=14336,
        experts=Experts(count=8, chosen=2, balance_loss=0.02),
        rope=_PLAIN,
    ),
    "qwen3-30b-a3b": _qwen3(False, 4, replace(_QWEN3_EXPERTS, dim=768), layers=48, width=2048, heads=32, mlp_dim=6144),
    "qwen3-235b-a22b": _qwen3(
        False, 4, replace(_QWEN3_EXPERTS, dim=1536), layers=94, width=4096, heads=64, mlp_dim=12288
    ),
    "deepseek-v3": _deepseek_v3(),
    "gpt2": _gpt2(layers=12, width=768),
    "gpt2-medium": _gpt2(layers=24, width=1024),
    "gpt2-large": _gpt2(layers=36, width=1280),
    "gpt2-xl": _gpt2(layers=48, width=1600),
}
"""Name to shape."""

VISION_SHAPES: dict[str, VisionTransformerConfig] = {
    "vit-s16": _vit(layers=12, width=384, heads=6, mlp_dim=1536),
    "vit-b16": _vit(layers=12, width=768, heads=12, mlp_dim=3072),
    "vit-l16": _vit(layers=24, width=1024, heads=16, mlp_dim=4096),
}
"""Name to shape, of classifiers of images."""


def shape(name: str) -> TransformerConfig:
    """The decoder of that name, or a ConfigError; change fields of it with `dataclasses.replace`."""
    return _named(name, SHAPES, "shape", "tiny")


def vision_shape(name: str) -> VisionTransformerConfig:
    """The image classifier of that name, or a ConfigError; change fields of it with `dataclasses.replace`."""
    return _named(name, VISION_SHAPES, "vision_shape", "vit-b16")


def _named[S](name: str, shapes: Mapping[str, S], function: str, example: str) -> S:
    if name not in shapes:
        near = difflib.get_close_matches(name.lower(), shapes, n=1, cutoff=0.4) or [example]
        raise ConfigError(f'zoo.{function}("{name}"): not one of the {len(shapes)} shapes; did you mean "{near[0]}"?')
    return shapes[name]
