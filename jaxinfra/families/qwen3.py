"""Qwen3 (Yang et al. 2025): norms on queries and keys in place of the biases of Qwen2."""

from typing import Any

from jaxinfra.families import qwen2
from jaxinfra.families.common import (
    Family,
    alike,
    dense_layers,
    layer_rules,
    model_rules,
    read_attention,
    read_rope,
)
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.attention import Attention
from jaxinfra.models.layers import MLP, NormConfig
from jaxinfra.models.moe import MixtureOfExperts
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope


def qwen3_shape(
    num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, mlp: MLP | MixtureOfExperts, **options: Any
) -> TransformerConfig:
    """Qwen/Qwen3-{0.6B,...,32B}, Qwen3-30B-A3B and Qwen3-235B-A22B."""
    rope = Rope(theta=1e6)
    return alike(
        vocab_size=151936,
        num_layers=num_layers,
        hidden_size=hidden_size,
        mixer=Attention(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128, qk_norm="head", rope=rope),
        mlp=mlp,
        norm=NormConfig(eps=1e-6),
        **options,
    )


def _dense(num_layers: int, hidden_size: int, num_heads: int, mlp_dim: int, **options: Any) -> TransformerConfig:
    return qwen3_shape(num_layers, hidden_size, num_heads, 8, MLP(dim=mlp_dim), **options)


SHAPES: dict[str, TransformerConfig] = {
    "qwen3-0.6b": _dense(num_layers=28, hidden_size=1024, num_heads=16, mlp_dim=3072, tie_embeddings=True),
    "qwen3-1.7b": _dense(num_layers=28, hidden_size=2048, num_heads=16, mlp_dim=6144, tie_embeddings=True),
    "qwen3-4b": _dense(num_layers=36, hidden_size=2560, num_heads=32, mlp_dim=9728, tie_embeddings=True),
    "qwen3-8b": _dense(num_layers=36, hidden_size=4096, num_heads=32, mlp_dim=12288),
    "qwen3-14b": _dense(num_layers=40, hidden_size=5120, num_heads=40, mlp_dim=17408),
    "qwen3-32b": _dense(num_layers=64, hidden_size=5120, num_heads=64, mlp_dim=25600),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Qwen3."""
    keys.default(head_dim=128)
    bias = keys.take("attention_bias", bool, False)
    mixer = read_attention(keys, rope=read_rope(keys), qk_norm="head", qkv_bias=bias, out_bias=bias)
    return qwen2.read_qwen(keys, mixer)


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen3."""
    mixer, _ = dense_layers(model)[0]
    return qwen2.write(model) | {"attention_bias": mixer.qkv_bias}


FAMILY = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    read=read,
    write=write,
    layer_rules=layer_rules,
    model_rules=model_rules,
)
