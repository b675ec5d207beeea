"""Qwen3 (Yang et al. 2025): norms on queries and keys in place of the biases of Qwen2."""

from functools import partial
from typing import Any

from jaxinfra.families import qwen2
from jaxinfra.families.common import Family, decoder, dense_layers, read_attention
from jaxinfra.interop.config_json import ModelJson
from jaxinfra.models.layers import NormConfig
from jaxinfra.models.transformer import TransformerConfig
from jaxinfra.ops.rope import Rope

# Qwen/Qwen3-{0.6B,...,32B}, Qwen3-30B-A3B and Qwen3-235B-A22B
qwen3_shape = partial(
    decoder, vocab_size=151936, head_dim=128, qk_norm="head", rope=Rope(theta=1e6), norm=NormConfig(eps=1e-6)
)
_dense = partial(qwen3_shape, num_kv_heads=8)

SHAPES: dict[str, TransformerConfig] = {
    "qwen3-0.6b": _dense(num_layers=28, hidden_size=1024, num_heads=16, mlp=3072, tie_embeddings=True),
    "qwen3-1.7b": _dense(num_layers=28, hidden_size=2048, num_heads=16, mlp=6144, tie_embeddings=True),
    "qwen3-4b": _dense(num_layers=36, hidden_size=2560, num_heads=32, mlp=9728, tie_embeddings=True),
    "qwen3-8b": _dense(num_layers=36, hidden_size=4096, num_heads=32, mlp=12288),
    "qwen3-14b": _dense(num_layers=40, hidden_size=5120, num_heads=40, mlp=17408),
    "qwen3-32b": _dense(num_layers=64, hidden_size=5120, num_heads=64, mlp=25600),
}


def read(keys: ModelJson) -> TransformerConfig:
    """Reads the keys of a Qwen3."""
    keys.default(head_dim=128)
    return qwen2.read_qwen(keys, read_attention(keys, bias=False, qk_norm="head"))


def write(model: TransformerConfig) -> dict[str, Any]:
    """Returns the keys of a Qwen3."""
    mixer, _ = dense_layers(model)[0]
    return qwen2.write(model) | {"attention_bias": mixer.qkv_bias}


FAMILY = Family(model_type="qwen3", architecture="Qwen3ForCausalLM", read=read, write=write)
